"""A training step never waits for the GPU: what depends on a batch's values is found before the batch is copied there.

The meta device has shapes but no values, so whatever must read a value from the device fails on it: `item`, `tolist`,
`nonzero`, a boolean index, a copy to the CPU. Everything that asks for `cpu` takes the way of a GPU there.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from helpers import new_module, relative_difference
from lit_phi2.data.collate import collate
from lit_phi2.model import phi2
from lit_phi2.model.attention import PackedLayout
from lit_phi2.model.lora import trainable_parameters
from lit_phi2.model.loss import causal_lm_loss
from lit_phi2.training.module import LitPhi2
from lit_phi2.types import IGNORE_INDEX, Batch, Example, Scored

EXAMPLES = [Example(str(n), list(range(5 + n, 40 + 7 * n)), 4 + n) for n in range(5)]
BATCH = collate(EXAMPLES, [(0, 1), (2, 4), (3,)])


def gradients(module: LitPhi2) -> dict[str, Tensor]:
    assert module.phi is not None
    return {name: p.grad for name, p in trainable_parameters(module.phi).items() if p.grad is not None}


def take_step(module: LitPhi2, batch: Batch) -> None:
    """Forward, backward and clipping of a micro-batch."""
    torch.manual_seed(batch.seed)
    (module.loss(batch).nats * batch.loss_weight).backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)


def use_varlen_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout that a CUDA device has, on the device of the batch."""

    def packed_layout(position_ids: Tensor, segments: list[tuple[int, int]]) -> PackedLayout:
        cu_seqlens = torch.tensor([0, *(end for _, end in segments)], dtype=torch.int32, device=position_ids.device)
        return PackedLayout(segments, cu_seqlens)

    monkeypatch.setattr(phi2, "packed_layout", packed_layout)


@pytest.mark.parametrize("activation_checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_training_step_reads_no_value_from_the_device(
    dtype: str, activation_checkpointing: bool, phi_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every dropout on, and in bfloat16 with the varlen kernel. Only the seed is set on the host."""
    settings = {"dtype": dtype, "lora_dropout": 0.2, "activation_checkpointing": activation_checkpointing}
    module = new_module(phi_dir, dropout=True, **settings).to("meta")
    use_varlen_attention(monkeypatch)
    take_step(module, BATCH.to("meta"))
    assert len(gradients(module)) == 12
    assert all(gradient.is_meta for gradient in gradients(module).values())


def test_what_the_host_did_not_find_makes_it_wait(phi_dir: Path) -> None:
    """The check itself: without the layout of the batch, a step has to ask the device."""
    module, batch = new_module(phi_dir).to("meta"), BATCH.to("meta")
    with pytest.raises(RuntimeError, match="meta"):
        phi2.packed_forward(module.fused_phi, batch.input_ids, batch.position_ids)
    with pytest.raises(RuntimeError, match="meta"):
        replace(batch, layout=None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loss_and_gradients_keep_their_bits(dtype: str, phi_dir: Path) -> None:
    """Reference: states and targets chosen by a mask on the device, and examples found by their positions."""
    module = new_module(phi_dir, dtype=dtype)
    loss = module.loss(BATCH)
    loss.nats.backward()
    actual = {name: gradient.clone() for name, gradient in gradients(module).items()}
    module.zero_grad()
    hidden = phi2.packed_forward(module.fused_phi, BATCH.input_ids, BATCH.position_ids)
    targets = BATCH.labels[:, 1:]
    supervised = targets != IGNORE_INDEX
    padded = F.pad(hidden[:, :-1][supervised], (0, 0, 0, 1))[None]  # the state after the last predicts nothing
    labels = F.pad(targets[supervised], (1, 0), value=IGNORE_INDEX)[None]
    expected = causal_lm_loss(padded, labels, module.fused_phi.lm_head)
    expected.nats.backward()
    assert torch.equal(loss.nats, expected.nats)
    assert loss.num_tokens == supervised.sum() == BATCH.supervised_tokens
    assert loss.num_correct == expected.num_correct
    assert actual.keys() == gradients(module).keys()
    assert all(torch.equal(actual[name], gradient) for name, gradient in gradients(module).items())


def test_padding_on_the_way_to_a_device_changes_no_loss(phi_dir: Path) -> None:
    """The layout is that of the padded rows, whose padding is one more example."""
    module, batch = new_module(phi_dir), BATCH.to("cpu")
    assert batch.input_ids.shape[1] > BATCH.input_ids.shape[1]
    assert batch.layout is not None
    assert batch.layout.segments[-1][1] == batch.input_ids.numel()
    assert module.loss(batch).nats.item() == pytest.approx(module.loss(BATCH).nats.item(), rel=1e-6)


def test_padding_for_few_shapes_changes_no_loss(phi_dir: Path) -> None:
    """Supervised positions are padded where a GPU keeps memory for every shape; on the CPU nothing else differs."""
    for head_is_frozen in (True, False):
        module, batch = new_module(phi_dir), BATCH.to("cpu")
        module.fused_phi.lm_head.requires_grad_(not head_is_frozen)
        assert batch.layout is not None
        scored = batch.layout.scored
        positions, targets = F.pad(scored.positions, (0, 37)), F.pad(scored.targets, (0, 37), value=IGNORE_INDEX)
        padded = replace(batch, layout=replace(batch.layout, scored=Scored(positions, targets, scored.count)))
        losses, grads = [], []
        for each in (batch, padded):
            module.zero_grad()
            losses.append(module.loss(each))
            losses[-1].nats.backward()
            grads.append({name: gradient.clone() for name, gradient in gradients(module).items()})
        assert losses[1].nats.item() == pytest.approx(losses[0].nats.item(), rel=1e-6)
        assert losses[1].num_tokens == losses[0].num_tokens == scored.count
        assert losses[1].num_correct == losses[0].num_correct
        for name, gradient in grads[0].items():
            assert relative_difference(grads[1][name], gradient) < 1e-5, name


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cuda_reports_no_synchronization_in_a_step(dtype: str, phi_dir: Path) -> None:
    """Copy of the batch, forward, backward and clipping, after a step that compiles and allocates."""
    module = new_module(phi_dir, dropout=True, dtype=dtype, lora_dropout=0.2).to("cuda")
    take_step(module, BATCH.to("cuda"))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        take_step(module, BATCH.to("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
