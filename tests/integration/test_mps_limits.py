"""A Mac's way through training and decoding, run without a Mac: no operator or dtype that MPS lacks, and few shapes.

Training runs on the meta device, where everything that asks for `cpu` takes the way of a GPU, with the attention that
MPS has. Decoding and the audits run on the CPU, in the functions that a Mac runs.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from helpers import new_module
from lit_phi2.data.collate import collate
from lit_phi2.data.schedule import BatchingConfig
from lit_phi2.generation.cache_attention import Segment
from lit_phi2.generation.decoder import Decoder
from lit_phi2.generation.kv_cache import KVCache
from lit_phi2.generation.static_decoder import StaticDecoder
from lit_phi2.generation.weights import prepare_weights
from lit_phi2.model import phi2
from lit_phi2.model.attention import PackedLayout, block_causal_mask
from lit_phi2.training.auditing import example_nats
from lit_phi2.training.optim import build_optimizer
from lit_phi2.types import PAD_TO_MULTIPLE_OF, Batch, Example
from mps_limits import MpsLimits, NotOnMps, has_mps_kernel


@pytest.fixture(autouse=True)
def mps_attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The layout that MPS has, batches padded for it, and the attention that torch computes with matmuls there."""

    def packed_layout(position_ids: Tensor, segments: list[tuple[int, int]] | None = None) -> PackedLayout:
        return PackedLayout(segments or [], attn_mask=block_causal_mask(position_ids))

    monkeypatch.setattr(phi2, "packed_layout", packed_layout)
    monkeypatch.setitem(PAD_TO_MULTIPLE_OF, "meta", PAD_TO_MULTIPLE_OF["mps"])
    with sdpa_kernel(SDPBackend.MATH):
        yield


def batch_of(lengths: list[int], prompt_length: int) -> Batch:
    examples = [Example(str(n), list(range(5, 5 + length)), prompt_length) for n, length in enumerate(lengths)]
    return collate(examples, [tuple(range(len(examples)))]).to("meta")


def step_shapes(folder: Path, batch: Batch, **settings: object) -> set[tuple[object, ...]]:
    """Of a training step with clipping and the optimizer's update, under the limits of MPS."""
    module = new_module(folder, dropout=True, lora_dropout=0.2, **settings).to("meta")
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    optimizer = build_optimizer(parameters, learning_rate=1e-3, weight_decay=0.01)
    for group in optimizer.param_groups:
        group["fused"] = False  # meta has no fused kernel; MPS has one: see below
    with MpsLimits("meta") as limits:
        (module.loss(batch).nats * batch.loss_weight).backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
    return limits.shapes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_a_training_step_uses_only_what_mps_has(dtype: str, activation_checkpointing: bool, phi_dir: Path) -> None:
    settings = {"dtype": dtype, "activation_checkpointing": activation_checkpointing}
    shapes = step_shapes(phi_dir, batch_of([30, 50, 21], 6), **settings)
    assert {"aten::mm", "aten::native_layer_norm_backward", "aten::gelu_backward"} <= {name for name, *_ in shapes}
    assert has_mps_kernel("_fused_adamw_")


def test_batches_of_a_bucket_have_the_same_shapes(phi_dir: Path) -> None:
    """Other examples, other supervised tokens, other lengths up to the same multiple; a larger bucket has others."""
    shapes = [
        step_shapes(phi_dir, batch_of(lengths, prompt_length))
        for lengths, prompt_length in (([30, 50, 21], 6), ([110, 12], 9), ([100, 100], 2))
    ]
    assert shapes[0] == shapes[1]
    assert shapes[0] != shapes[2]


def test_decoding_uses_only_what_mps_has(phi_dir: Path) -> None:
    """Prefill, and passes of one shape; their tokens are those without the mode."""
    model = new_module(phi_dir).fused_phi
    chosen = []
    for mode in (torch.inference_mode(), MpsLimits("cpu")):
        decoder = Decoder(model, prepare_weights(model, use_adapter=True, num_rows=2, num_passes=None))
        cache = KVCache(decoder.cache_shape, 2, 320, decoder.device)
        static = StaticDecoder(decoder, cache)
        with mode:
            ids = list(range(5, 45))
            tokens = decoder.forward(cache, ids, [Segment(0, 0, 40)], [39])
            for position in range(40, 46):
                tokens.append(static.forward([(tokens[-1], position), None])[0])
        chosen.append(tokens)
    assert chosen[0] == chosen[1]


def test_decode_passes_have_one_shape_for_256_positions(phi_dir: Path) -> None:
    model = new_module(phi_dir).fused_phi
    decoder = Decoder(model, prepare_weights(model, use_adapter=True, num_rows=2, num_passes=None))
    cache = KVCache(decoder.cache_shape, 2, 512, decoder.device)
    static = StaticDecoder(decoder, cache)
    shapes = []
    for first, last in ((3, None), (9, 200), (300, 7)):
        with MpsLimits("cpu") as limits:
            static.forward([(5, first), None if last is None else (6, last)])
        shapes.append(limits.shapes)
    assert shapes[0] == shapes[1]
    assert shapes[0] != shapes[2]


def test_the_losses_of_records_use_only_what_mps_has(phi_dir: Path) -> None:
    """In the packed rows of `audit`, on the meta device up to where values come back to the host."""
    module = new_module(phi_dir).to("meta")
    examples = [Example(str(n), list(range(5, 30 + n)), 4) for n in range(3)]
    lengths = np.array([len(example.ids) for example in examples])
    with MpsLimits("meta"), pytest.raises(RuntimeError, match="no data"):
        example_nats(module.fused_phi, examples, lengths, BatchingConfig(128))


@pytest.mark.parametrize(
    ("refused", "what"),
    [
        (lambda x: x.double(), "float64"),
        (lambda x: torch._int_mm(x.to(torch.int8), x.to(torch.int8)), "_int_mm"),
        (lambda x: x.to(torch.complex128), "complex128"),
        (lambda x: torch.special.bessel_j1(x) + torch.geqrf(x)[0], "geqrf|bessel_j1"),
    ],
)
def test_the_mode_refuses_what_mps_lacks(refused: object, what: str) -> None:
    """Reference: what torch says on a Mac, for dtypes in aten/src/ATen/native/mps, for operators in its table."""
    with MpsLimits("cpu"), pytest.raises(NotOnMps, match=what):
        refused(torch.ones(32, 32))  # type: ignore[operator]
