"""Resume: a run that is interrupted and resumed must end with the weights of a run that is not, bit for bit.

    fit to the end                                        -> weights
    fit, interrupted in its second epoch; fit last.ckpt   -> the same weights, in every dtype

Every dropout is on. A device that sums in a different order each time differs between two uninterrupted runs too; if
the resumed run differs, a second uninterrupted run shows whether this is the reason.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from gpu_parts.machine import compute_dtype, has_float16, has_int8
from gpu_parts.settings import Settings
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.model.device import has_fast_bf16
from lit_phi2.model.lora import adapter_state_dict
from lit_phi2.training.module import LitPhi2
from lit_phi2.training.trainer import Trainer

EPOCHS, ACCUMULATE = 2, 2
Weights = dict[str, Tensor]


class Interruption(Exception):  # noqa: N818  it reports no error
    """Ends a run as a power failure would: nothing but last.ckpt is left."""


class InterruptAt(Callback):
    """Raises at the first micro-batch after an optimizer step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LitPhi2, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise Interruption


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """Compare all dtypes.

    Raises:
        SystemExit: the resumed run differs.
    """
    results: dict[str, Any] = {}
    verdicts: dict[str, str] = {}
    for name, module_settings in variants(settings).items():
        results[name] = compare(settings, name, module_settings)
        verdicts[name] = "equal" if results[name]["equal"] else "DIFFERENT"
        yield {**results, "summary": ", ".join(f"{name} {verdict}" for name, verdict in verdicts.items())}
    if not all(result["equal"] for result in results.values()):
        raise SystemExit(f"the resumed run is not the uninterrupted one: {verdicts}")


def variants(settings: Settings) -> dict[str, dict[str, Any]]:
    """Settings of the module, by a name for the table: every dtype that this version and the device have.

    On CUDA also with compiled operations, which so short a run would not choose.
    """
    chosen: dict[str, dict[str, Any]] = {"float32": {"dtype": "float32"}}
    if settings.device != "mps" or has_fast_bf16(torch.device("mps"))[0]:
        chosen["bfloat16"] = {"dtype": "bfloat16"}
    if has_float16():
        chosen["float16"] = {"dtype": "float16"}
    if has_int8():
        chosen["int8"] = {"dtype": compute_dtype(settings), "quantization": "int8"}
    if settings.device == "cuda":
        chosen["compiled"] = {"dtype": compute_dtype(settings), "compiled": True}
    return chosen


def compare(settings: Settings, name: str, module_settings: dict[str, Any]) -> dict[str, Any]:
    folder = settings.work_path / "resume" / name
    shutil.rmtree(folder, ignore_errors=True)
    whole, steps = fit(settings, module_settings, folder / "whole")
    interrupt_at = steps // EPOCHS + 1  # inside the second epoch
    try:
        fit(settings, module_settings, folder / "interrupted", InterruptAt(interrupt_at))
    except Interruption:
        pass
    else:
        raise SystemExit(f"the run of {steps} steps was not interrupted at step {interrupt_at}")
    (last,) = (folder / "interrupted").glob("*/version_0/checkpoints/last.ckpt")
    resumed, _ = fit(settings, module_settings, folder / "interrupted", ckpt_path=str(last))
    result: dict[str, Any] = {"steps": steps, "interrupted_at": interrupt_at, "equal": equal(resumed, whole)}
    if not result["equal"]:
        result["largest_difference"] = max((resumed[name] - whole[name]).abs().max().item() for name in whole)
        result["uninterrupted_runs_equal"] = equal(fit(settings, module_settings, folder / "again")[0], whole)
    return result


def fit(
    settings: Settings,
    module_settings: dict[str, Any],
    folder: Path,
    *callbacks: Callback,
    ckpt_path: str | None = None,
) -> tuple[Weights, int]:
    """A run of two epochs; its weights and its number of optimizer steps."""
    base = str(settings.base_dir) if settings.tiny else "tiny"
    module_settings = dict(module_settings)
    compiled = module_settings.pop("compiled", None)
    module = LitPhi2(base=base, lora_r=4, lora_alpha=8, lora_dropout=0.1, max_new_tokens=4, **module_settings)
    module.compiled = compiled
    data = ClaimsDataModule(
        train_files="claims:train[:12]", val_files="claims:validation[:2]", max_length=1024, base=base, max_new_tokens=4
    )
    trainer = Trainer(
        default_root_dir=folder,
        accelerator=settings.device,
        devices=1,
        callbacks=list(callbacks),
        max_epochs=EPOCHS,
        accumulate_grad_batches=ACCUMULATE,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
    )
    trainer.checkpoint_every_n_steps = 1
    trainer.fit(module, data, ckpt_path=ckpt_path)
    assert module.phi is not None
    return adapter_state_dict(module.phi), trainer.global_step


def equal(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
