"""How tests run the real thing: a Trainer on records, in float32 on the CPU, and what it leaves behind."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.model.lora import adapter_state_dict, trainable_parameters
from lit_phi2.training.module import LitPhi2
from lit_phi2.training.trainer import Trainer
from lit_phi2.utils.files import tree_digest

ROOT = Path(__file__).parents[1]
TINY_CONFIG = ROOT / "configs" / "tiny.yaml"
DEVICES = [pytest.param("cuda", marks=pytest.mark.cuda), pytest.param("mps", marks=pytest.mark.mps)]

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def new_module(base: Path, *, dropout: bool = False, **settings: Any) -> LitPhi2:
    """A LitPhi2 whose B is not zero, so that A has a gradient. Dropout is off unless requested."""
    settings = {"dtype": "float32", "max_new_tokens": 8, "lora_r": 4, "lora_alpha": 8, "warmup_ratio": 0.0} | settings
    module = LitPhi2(base=str(base), **settings)
    module.configure_model()
    fill_lora_b(module)
    if not dropout:
        for layer in module.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
    return module


def fill_lora_b(module: LitPhi2, seed: int = 1) -> None:
    assert module.phi is not None
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in trainable_parameters(module.phi).items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def new_data(base: Path, train: Path, **settings: Any) -> ClaimsDataModule:
    settings = {"val_files": str(train), "predict_files": str(train), "max_length": 128, "max_new_tokens": 8} | settings
    return ClaimsDataModule(train_files=str(train), base=str(base), **settings)


def new_trainer(folder: Path, callbacks: Sequence[Callback] = (), *, keep: bool = False, **settings: Any) -> Trainer:
    """A Trainer as the CLI makes it.

    Args:
        folder: trainer.default_root_dir.
        callbacks: in addition to the Trainer's own.
        keep: whether it writes checkpoints, adapter and curves.
        settings: of the Trainer.
    """
    defaults = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "max_epochs": 1,
        "gradient_clip_val": 1.0,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }
    trainer = Trainer(callbacks=list(callbacks), **(defaults | QUIET | settings))
    trainer.enable_tensorboard = trainer.enable_checkpoints = keep
    trainer.enable_progress = False
    return trainer


class Gradients(Callback):
    """Keeps the gradients of every optimizer step, before clipping."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LitPhi2, optimizer: Any) -> None:
        assert pl_module.phi is not None
        parameters = trainable_parameters(pl_module.phi)
        self.steps.append({name: p.grad.clone() for name, p in parameters.items() if p.grad is not None})


class DieAt(Callback):
    """Fails at the first batch after a step, like a power cut."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LitPhi2, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("power cut")


def weights_of(module: LitPhi2) -> dict[str, Tensor]:
    assert module.phi is not None
    return adapter_state_dict(module.phi)


def digest_of_tensors(file: Path) -> str:
    """Of a safetensors file without its metadata, which name the provenance of its run and so the ledger's salt."""
    return tree_digest(dict(sorted(load_file(file).items())))


def check_time_is_linear(run: Callable[[int], object], small: int, large: int) -> None:
    """Compare the CPU time of two sizes: nearer to linear than to quadratic, in one of three tries.

    Time in which the process waits does not count, and what disturbs the processor does not come three times.
    """
    factor = large / small
    for _ in range(3):
        seconds = []
        for size in (small, large):
            started = time.process_time()
            run(size)
            seconds.append(time.process_time() - started)
        if seconds[1] < factor**1.5 * seconds[0]:
            return
    pytest.fail(f"{factor:.0f} times the size took {seconds[1] / seconds[0]:.0f} times as long")


def relative_difference(value: Tensor, expected: Tensor) -> float:
    """In norm: single float32 elements move by 2e-3 with the order of summation, whole tensors by 1e-6."""
    return ((value - expected).norm() / expected.norm()).item()
