"""Whether the operations of a block are compiled: chosen by planted times, kept by a resumed run, never in the way."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import DieAt, new_data, new_module, new_trainer, weights_of
from lit_phi2.adapters.checkpoint import read_checkpoint
from lit_phi2.data.collate import collate
from lit_phi2.model import fusion
from lit_phi2.model.fusion import EAGER, BlockOps
from lit_phi2.training import block_ops
from lit_phi2.training.block_ops import MIN_RUN_SECONDS, block_seconds, choose_compiled
from lit_phi2.types import Example

LONG = 10**9  # passes through a block
COMPILED = fusion.compile_ops("aot_eager")


def fail(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("Cannot find a working triton installation.\nSee the manual.")


def times(eager: float, compiled: float) -> Any:
    return lambda ops: eager if ops is EAGER else compiled


@pytest.fixture
def compile_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU takes the way of a card, with the compiler's eager backend."""
    monkeypatch.setattr(block_ops, "DEVICE_TYPES", ("cpu",))
    monkeypatch.setattr(block_ops, "compile_ops", lambda: COMPILED)


def test_the_faster_operations_are_chosen_and_both_times_told() -> None:
    assert choose_compiled(times(0.012, 0.011), num_passes=LONG) == (
        True,
        "compiled; 11.00 ms a block compiled, 12.00 ms with torch's own",
    )
    assert choose_compiled(times(0.012, 0.013), num_passes=LONG) == (
        False,
        "torch's own; 13.00 ms a block compiled, 12.00 ms with torch's own",
    )


def test_a_short_run_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seconds of its blocks are those of a pass, times the passes."""
    monkeypatch.setattr(block_ops, "compile_ops", fail)
    compiled, reason = choose_compiled(times(0.25, 0.0), num_passes=4 * MIN_RUN_SECONDS - 1)
    assert not compiled
    assert reason == f"torch's own; {MIN_RUN_SECONDS} s in blocks are too few to compile for"
    monkeypatch.setattr(block_ops, "compile_ops", lambda: COMPILED)
    assert choose_compiled(times(0.25, 0.0), num_passes=4 * MIN_RUN_SECONDS)[0]


def test_a_compiler_that_fails_leaves_torchs_own() -> None:
    def seconds(ops: BlockOps) -> float:
        return 1.0 if ops is EAGER else fail()

    for saved, end in ((None, "installation.\\nSee the manual.'"), (True, "continues, but not bit for bit")):
        compiled, reason = choose_compiled(seconds, num_passes=LONG, saved=saved)
        assert not compiled
        assert reason.startswith("torch's own, because torch.compile fails here: RuntimeError: 'Cannot find a working")
        assert reason.endswith(end)


def test_a_resumed_run_does_not_choose_again() -> None:
    assert choose_compiled(times(0.012, 0.5), num_passes=1, saved=True)[0]
    assert choose_compiled(fail, num_passes=LONG, saved=False) == (False, "torch's own, as before")


def test_a_measurement_leaves_the_model_as_it_was(phi_dir: Path) -> None:
    """Its operations and gradients; both kinds are run through two blocks and back."""
    module = new_module(phi_dir, dropout=True)
    batch = collate([Example("r", list(range(1, 40)), 3)] * 3, [(0, 1), (2,)]).to("cpu")
    for ops in (EAGER, COMPILED):
        assert 0 < block_seconds(module.fused_phi, batch, ops) < 60
    assert module.fused_phi.block_ops is EAGER
    assert all(parameter.grad is None for parameter in module.parameters())
    with pytest.raises(RuntimeError, match="triton"):
        block_seconds(module.fused_phi, batch, BlockOps(fail, fail))
    assert module.fused_phi.block_ops is EAGER


def run(base: Path, train: Path, folder: Path, *callbacks: Any, **resume: Any) -> dict[str, Tensor]:
    """Two epochs with every dropout on; the weights."""
    module = new_module(base, dropout=True, lora_dropout=0.1)
    trainer = new_trainer(folder, callbacks, keep=True, max_epochs=2, accumulate_grad_batches=2)
    trainer.checkpoint_every_n_steps = 1
    trainer.fit(module, new_data(base, train), **resume)
    return weights_of(module)


def checkpoint_of(folder: Path) -> Path:
    return folder / "run" / "version_0" / "checkpoints" / "last.ckpt"


def test_a_resumed_run_has_the_operations_of_its_checkpoint(
    phi_dir: Path,
    train_file: Path,
    tmp_path: Path,
    compile_on_cpu: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Bit for bit the uninterrupted run, although compiling would lose by now; torch's own draw another dropout."""
    caplog.set_level(logging.INFO, "lit_phi2")
    monkeypatch.setattr(block_ops, "MIN_RUN_SECONDS", 0)
    monkeypatch.setattr(block_ops, "block_seconds", lambda model, batch, ops, **_: 2.0 if ops is EAGER else 1.0)
    expected = run(phi_dir, train_file, tmp_path / "whole")
    assert "operations of a block: compiled; 1000.00 ms a block compiled" in caplog.text
    with pytest.raises(RuntimeError, match="power cut"):
        run(phi_dir, train_file, tmp_path / "cut", DieAt(3))
    last = checkpoint_of(tmp_path / "cut")
    assert read_checkpoint(last)[1]["lit_phi2"]["compiled"] is True
    monkeypatch.setattr(block_ops, "block_seconds", lambda model, batch, ops, **_: 1.0 if ops is EAGER else 2.0)
    resumed = run(phi_dir, train_file, tmp_path / "cut", ckpt_path=str(last))
    assert all(torch.equal(resumed[name], weight) for name, weight in expected.items())
    eager = run(phi_dir, train_file, tmp_path / "eager")
    assert read_checkpoint(checkpoint_of(tmp_path / "eager"))[1]["lit_phi2"]["compiled"] is False
    assert not all(torch.equal(eager[name], weight) for name, weight in expected.items())


def test_a_run_goes_on_where_nothing_compiles(
    phi_dir: Path, train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Reference: the run on a device that compiles nothing."""
    caplog.set_level(logging.INFO, "lit_phi2")
    expected = run(phi_dir, train_file, tmp_path / "cpu")
    assert "operations of a block" not in caplog.text
    monkeypatch.setattr(block_ops, "DEVICE_TYPES", ("cpu",))
    monkeypatch.setattr(block_ops, "MIN_RUN_SECONDS", 0)
    monkeypatch.setattr(block_ops, "compile_ops", lambda: BlockOps(fail, fail))
    weights = run(phi_dir, train_file, tmp_path / "failing")
    assert "operations of a block: torch's own, because torch.compile fails here: RuntimeError" in caplog.text
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())
