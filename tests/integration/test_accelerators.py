"""Whole runs on a GPU, compared with the CPU; reported as not run on a machine without one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from helpers import (
    DEVICES,
    TINY_CONFIG,
    DieAt,
    Gradients,
    new_data,
    new_module,
    new_trainer,
    relative_difference,
    weights_of,
)
from lit_phi2.cli.main import main
from lit_phi2.data.collate import collate
from lit_phi2.types import Example

Jsonl = Callable[..., Path]


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
    """Two epochs over packed rows, with two micro-batches and a validation a step; returns the trained weights."""
    module = new_module(base, **model)
    data = new_data(base, train, batch_size=2, seed=seed)
    settings = {"max_epochs": 2, "accumulate_grad_batches": 2, "val_check_interval": 2, "num_sanity_val_steps": -1}
    trainer = new_trainer(folder, callbacks, keep=True, accelerator=accelerator, devices=1, **settings)
    trainer.fit(module, data, ckpt_path=str(resume) if resume else None)
    assert trainer.global_step > 2
    return weights_of(module)


@pytest.fixture
def train(write_jsonl: Jsonl, record_rows: list[dict[str, str]]) -> Path:
    """Enough records for several accumulation windows an epoch."""
    return write_jsonl([{**record, "id": f"{record['id']}-{copy}"} for copy in range(5) for record in record_rows])


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_on_a_device_takes_the_steps_of_the_cpu(device: str, phi_dir: Path, train: Path, tmp_path: Path) -> None:
    """Reference: the run on the CPU, in float32. At the first step only the order of summation differs, by 1e-4 in
    relative norm. Adam then divides small gradients by their own size, which enlarges rounding differences, so the
    tolerance of the final weights is 2e-2."""
    cpu_gradients, device_gradients = Gradients(), Gradients()
    expected = run(phi_dir, train, tmp_path / "cpu", "cpu", cpu_gradients)
    weights = run(phi_dir, train, tmp_path / device, device, device_gradients)
    assert len(device_gradients.steps) == len(cpu_gradients.steps)
    for name, gradient in cpu_gradients.steps[0].items():
        assert relative_difference(device_gradients.steps[0][name].cpu(), gradient) < 1e-4, name
    for name, weight in expected.items():
        assert relative_difference(weights[name], weight) < 2e-2, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_on_a_device_is_the_same_run(
    device: str, dtype: str, phi_dir: Path, train: Path, tmp_path: Path
) -> None:
    """Reference: the uninterrupted run, with every dropout on. A GPU may sum in another order each time, so the
    tolerance in float32 is 1e-3 in relative norm, and in bfloat16 a quarter of the difference that another seed makes
    (1.6e-2 on a CPU)."""
    settings = {"dtype": dtype, "dropout": True, "lora_dropout": 0.2}
    expected = run(phi_dir, train, tmp_path / "whole", device, **settings)
    with pytest.raises(RuntimeError, match="power cut"):
        run(phi_dir, train, tmp_path / "cut", device, DieAt(2), **settings)
    last = tmp_path / "cut" / "run" / "version_0" / "checkpoints" / "last.ckpt"
    resumed = run(phi_dir, train, tmp_path / "cut", device, resume=last, **settings)
    difference = max(relative_difference(resumed[name], weight) for name, weight in expected.items())
    equal = all(torch.equal(resumed[name], weight) for name, weight in expected.items())
    other_seed = run(phi_dir, train, tmp_path / "other", device, **settings, seed=7)
    seed_difference = min(
        relative_difference(other_seed[name], weight) for name, weight in expected.items() if "lora_B" in name
    )
    print(
        f"\n{device} {dtype}: bit-equal {equal}, difference {difference:.1e}, with another seed {seed_difference:.1e}"
    )
    assert difference < (1e-3 if dtype == "float32" else seed_difference / 4)


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_gives_the_completions_of_the_cpu(device: str, phi_dir: Path) -> None:
    """Float32, prompts of different lengths; the two largest logits of a random Phi differ by more than rounding."""
    prompts = [list(range(5, 40)), list(range(50, 59)), list(range(100, 170))]
    module = new_module(phi_dir)
    expected = module.generate(prompts)
    assert module.to(device).generate(prompts) == expected


@pytest.mark.parametrize("device", DEVICES)
def test_activation_checkpointing_keeps_gradients_on_a_device(device: str, phi_dir: Path) -> None:
    """With every dropout on: the recomputed forward samples the same masks."""
    batch = collate([Example(str(n), list(range(5 + n, 40 + 7 * n)), 4) for n in range(3)], [(0, 1), (2,)]).to(device)
    gradients = []
    for activation_checkpointing in (False, True):
        settings = {"lora_dropout": 0.2, "activation_checkpointing": activation_checkpointing}
        module = new_module(phi_dir, dropout=True, **settings).to(device)
        torch.manual_seed(7)
        module.loss(batch).nats.backward()
        gradients.append({name: p.grad.cpu() for name, p in module.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == 12
    for name, gradient in gradients[0].items():
        assert relative_difference(gradients[1][name], gradient) < 1e-5, name


@pytest.mark.parametrize("device", DEVICES)
def test_the_command_line_trains_and_predicts_on_the_device(device: str, tmp_path: Path) -> None:
    """The packaged default on a few records, in the dtype that auto chooses."""
    common = ["--config", str(TINY_CONFIG), "--trainer.default_root_dir", str(tmp_path), "--model.max_new_tokens", "16"]
    few = ["--data.train_files", "claims:train[:64]", "--data.val_files", "claims:validation[:16]"]
    assert main(["fit", *common, *few]) == 0
    folder = tmp_path / "tiny" / "version_0"
    assert main(["predict", *common, "--ckpt_path", "best", "--data.predict_files", "claims:test[:5]"]) == 0
    lines = (folder / "predictions.jsonl").read_text("utf-8").splitlines()
    assert len([json.loads(line)["completion"] for line in lines]) == 5
