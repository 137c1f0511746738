"""Compiled operations of a block: values and gradients of torch's own, one compilation for all lengths."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

from helpers import new_module
from lit_phi2.data.collate import collate
from lit_phi2.model import phi2
from lit_phi2.model.attention import PackedLayout, RotateQkv, block_causal_mask
from lit_phi2.model.fusion import BlockOps, add_residual, compile_ops
from lit_phi2.model.lora import trainable_parameters
from lit_phi2.training.module import LitPhi2
from lit_phi2.types import Batch, Example, Segment

# torch's own operations, with the generator of torch's own dropout
REFERENCE = BlockOps(RotateQkv.apply, add_residual)
EXAMPLES = [Example(str(n), list(range(5 + n, 40 + 9 * n)), 4 + n) for n in range(5)]


def batch_of(*rows: tuple[int, ...]) -> Batch:
    return collate(EXAMPLES, rows).to("cpu")


def use_masked_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """A way of attention that calls rotate_qkv, as a GPU does."""

    def packed_layout(position_ids: Tensor, segments: list[Segment]) -> PackedLayout:
        return PackedLayout(segments, attn_mask=block_causal_mask(position_ids))

    monkeypatch.setattr(phi2, "packed_layout", packed_layout)


def loss_and_gradients(module: LitPhi2, batch: Batch, ops: BlockOps) -> dict[str, Tensor]:
    module.fused_phi.block_ops = ops
    module.zero_grad()
    torch.manual_seed(3)
    nats = module.loss(batch).nats
    nats.backward()
    assert module.phi is not None
    parameters = trainable_parameters(module.phi)
    return {"loss": nats.detach()} | {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}


@pytest.mark.parametrize("activation_checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_steps_equal_eager_steps(
    dtype: str, activation_checkpointing: bool, phi_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed rows, every dropout on, gradients of all LoRA weights; the eager backend computes what was traced.

    rotate_qkv rounds every product before it is added, RotateQkv every other one: by at most 1/256 in bfloat16.
    """
    use_masked_attention(monkeypatch)
    settings = {"dtype": dtype, "lora_dropout": 0.2, "activation_checkpointing": activation_checkpointing}
    module = new_module(phi_dir, dropout=True, **settings)
    batch = batch_of((0, 1), (2, 4), (3,))
    expected = loss_and_gradients(module, batch, REFERENCE)
    actual = loss_and_gradients(module, batch, compile_ops("aot_eager"))
    assert actual.keys() == expected.keys()
    assert len(expected) == 13  # the loss; A and B of three layers in two blocks
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= tolerance * value.norm(), name


def test_an_evaluation_takes_torchs_own_operations(phi_dir: Path) -> None:
    """So that operations are compiled for training alone."""
    module, batch = new_module(phi_dir), batch_of((0, 1))

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError

    module.fused_phi.block_ops = BlockOps(fail, fail)
    with torch.no_grad():
        module.loss(batch)
    with pytest.raises(AssertionError):
        module.loss(batch)


def test_rows_of_other_lengths_compile_nothing_again(phi_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most two graphs an operation: the input of the first block has no gradient."""
    use_masked_attention(monkeypatch)
    torch.compiler.reset()
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    module = new_module(phi_dir, dropout=True)
    counts = []
    for rows in (((0, 1),), ((2,), (3,)), ((4,),), ((0, 1, 2, 3),), ((1,), (2,), (3,))):
        loss_and_gradients(module, batch_of(*rows), compile_ops(backend))
        counts.append(len(graphs))
    assert counts[0] <= 4
    assert counts == [counts[0]] * 5


@pytest.mark.slow
def test_inductor_computes_what_torch_computes() -> None:
    """Torch's compiler for the CPU. Its dropout draws other numbers, so each must be zero or scaled, and seeded.

    What it saves for backward is in the memory plan: a byte for each mask, and nothing of qkv.
    """
    torch.compiler.reset()
    ops = compile_ops()
    qkv = torch.randn(64, 3, 4, 16, requires_grad=True)
    cos, sin = torch.rand(64, 4), torch.rand(64, 4)
    rotated, expected = (each.rotate_qkv(qkv, cos, sin) for each in (ops, REFERENCE))
    gradients = [torch.autograd.grad(sum(x.square().sum() for x in xs), qkv)[0] for xs in (rotated, expected)]
    for actual, reference in zip((*rotated, gradients[0]), (*expected, gradients[1]), strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-5, atol=1e-6)
    assert all(x.untyped_storage().data_ptr() != qkv.untyped_storage().data_ptr() for x in rotated)
    hidden, attn_output, mlp_output = (torch.randn(256, 64, requires_grad=True) for _ in range(3))
    sums, saved = [], []
    for _ in range(2):
        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            sums.append(ops.add_residual(hidden, attn_output, mlp_output, dropout=0.25))
    assert torch.equal(*sums)
    assert sum(x.untyped_storage().nbytes() for x in saved) <= 2 * (2 * 256 * 64 + 64)
    ones, attn_scale, mlp_scale = torch.autograd.grad(sums[0].sum(), (hidden, attn_output, mlp_output))
    assert ones.eq(1).all()
    for scale in (attn_scale, mlp_scale):
        assert scale.unique().tolist() == [0.0, pytest.approx(4 / 3)]
        assert scale.eq(0).double().mean() == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 256 / 64) ** 0.5)
    assert not torch.equal(attn_scale, mlp_scale)
    expected_sum = hidden + attn_output * attn_scale + mlp_output * mlp_scale
    torch.testing.assert_close(sums[0], expected_sum, rtol=1e-5, atol=1e-6)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_card_computes_the_same_compiled(dtype: str, phi_dir: Path) -> None:
    """Reference: torch's own operations on the card, without dropout. The dtypes have 24 and 8 bits."""
    module, batch = new_module(phi_dir, dtype=dtype).to("cuda"), collate(EXAMPLES, [(0, 1), (2, 4), (3,)]).to("cuda")
    expected = loss_and_gradients(module, batch, REFERENCE)
    actual = loss_and_gradients(module, batch, compile_ops())
    tolerance = {"float32": 1e-4, "bfloat16": 3e-2}[dtype]
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= tolerance * value.norm(), name
