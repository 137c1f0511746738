"""Whole runs on a GPU, held against the CPU; reported as not run where there is none.

Single functions on a GPU are in test_fused.py and test_devices.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from helpers import Gradients, new_data, new_module, new_trainer, relative_difference, weights_of
from lit_phi2.cli.main import main
from lit_phi2.data.collate import collate
from lit_phi2.training.module import LitPhi2
from lit_phi2.training.trainer import Trainer
from lit_phi2.types import Example

Jsonl = Callable[..., Path]
DEVICES = [pytest.param("cuda", marks=pytest.mark.cuda), pytest.param("mps", marks=pytest.mark.mps)]


class DieAt(Callback):
    """A power cut at the first batch after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LitPhi2, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("power cut")


def run(
    base: Path,
    train: Path,
    folder: Path,
    accelerator: str,
    *callbacks: Callback,
    resume: Path | None = None,
    seed: int = 42,
    **model: Any,
) -> dict[str, Tensor]:
    """Two epochs over packed rows, two micro-batches and a validation to a window; returns the trained weights."""
    module = new_module(base, **model)
    data = new_data(base, train, batch_size=2, seed=seed)
    settings = {"max_epochs": 2, "accumulate_grad_batches": 2, "val_check_interval": 2, "num_sanity_val_steps": -1}
    trainer = new_trainer(folder, callbacks, keep=True, accelerator=accelerator, devices=1, **settings)
    trainer.fit(module, data, ckpt_path=str(resume) if resume else None)
    assert trainer.global_step > 2
    return weights_of(module)


@pytest.fixture
def train(write_jsonl: Jsonl, some_records: list[dict[str, str]]) -> Path:
    """Enough records for several windows an epoch."""
    return write_jsonl([{**record, "id": f"{record['id']}-{copy}"} for copy in range(5) for record in some_records])


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_on_a_device_takes_the_steps_that_it_takes_on_the_cpu(
    device: str, phi_dir: Path, train: Path, tmp_path: Path
) -> None:
    """Float32. The first step has equal weights on both sides, and only the order of summation differs: 1e-4 in
    relative norm. After it Adam divides small gradients by their own size, which makes differences of the last places
    large, so the weights of the end are held to 2e-2."""
    of_cpu, of_device = Gradients(), Gradients()
    expected = run(phi_dir, train, tmp_path / "cpu", "cpu", of_cpu)
    got = run(phi_dir, train, tmp_path / device, device, of_device)
    assert len(of_device.steps) == len(of_cpu.steps)
    for name, gradient in of_cpu.steps[0].items():
        assert relative_difference(of_device.steps[0][name].cpu(), gradient) < 1e-4, name
    for name, weight in expected.items():
        assert relative_difference(got[name], weight) < 2e-2, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_on_a_device_that_is_resumed_is_the_same_run(
    device: str, dtype: str, phi_dir: Path, train: Path, tmp_path: Path
) -> None:
    """With every dropout on: the resumed steps draw what the others drew. A GPU may sum in another order each time, so
    weights are held to 1e-3 in relative norm in float32, and in bfloat16 to a quarter of what another order and another
    dropout make of them (1.6e-2 here on a CPU)."""
    settings = {"dtype": dtype, "dropout": True, "lora_dropout": 0.2}
    whole = run(phi_dir, train, tmp_path / "whole", device, **settings)
    with pytest.raises(RuntimeError, match="power cut"):
        run(phi_dir, train, tmp_path / "cut", device, DieAt(2), **settings)
    last = tmp_path / "cut" / "run" / "version_0" / "checkpoints" / "last.ckpt"
    resumed = run(phi_dir, train, tmp_path / "cut", device, resume=last, **settings)
    furthest = max(relative_difference(resumed[name], weight) for name, weight in whole.items())
    equal = all(torch.equal(resumed[name], weight) for name, weight in whole.items())
    other = run(phi_dir, train, tmp_path / "other", device, **settings, seed=7)
    apart = min(relative_difference(other[name], weight) for name, weight in whole.items() if "lora_B" in name)
    print(f"\n{device} {dtype}: resumed bit for bit: {equal}; {furthest:.1e} apart; with another seed {apart:.1e}")
    assert furthest < (1e-3 if dtype == "float32" else apart / 4)


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_gives_the_answers_of_the_cpu(device: str, phi_dir: Path) -> None:
    """Float32, prompts of different lengths; the two largest logits of a random Phi are further apart than rounding."""
    prompts = [list(range(5, 40)), list(range(50, 59)), list(range(100, 170))]
    module = new_module(phi_dir)
    expected = module.generate(prompts)
    assert module.to(device).generate(prompts) == expected


@pytest.mark.parametrize("device", DEVICES)
def test_activation_checkpointing_on_a_device_changes_no_gradient(device: str, phi_dir: Path) -> None:
    """With all dropout on, in the dtype of the device: it is drawn again as it was."""
    batch = collate([Example(str(n), list(range(5 + n, 40 + 7 * n)), 4) for n in range(3)], [(0, 1), (2,)]).to(device)
    gradients = []
    for on in (False, True):
        module = new_module(phi_dir, dropout=True, lora_dropout=0.2, activation_checkpointing=on).to(device)
        torch.manual_seed(7)
        module.loss(batch).nats.backward()
        gradients.append({name: p.grad.cpu() for name, p in module.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == 12
    for name, gradient in gradients[0].items():
        assert relative_difference(gradients[1][name], gradient) < 1e-5, name


@pytest.mark.parametrize("device", DEVICES)
def test_the_command_line_finds_the_device_trains_and_predicts(device: str, tmp_path: Path) -> None:
    """The packaged default on a few records, in the dtype that auto picks."""
    config = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")
    common = ["--config", config, "--trainer.default_root_dir", str(tmp_path), "--model.max_new_tokens", "16"]
    few = ["--data.train_files", "claims:train[:64]", "--data.val_files", "claims:validation[:16]"]
    assert main(["fit", *common, *few]) == 0
    folder = tmp_path / "tiny" / "version_0"
    assert main(["predict", *common, "--ckpt_path", "best", "--data.predict_files", "claims:test[:5]"]) == 0
    lines = (folder / "predictions.jsonl").read_text("utf-8").splitlines()
    assert len([json.loads(line)["completion"] for line in lines]) == 5
