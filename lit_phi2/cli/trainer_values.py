"""Trainer values: refuse each value of a Trainer key that would crash a run, or silently do something else.

    accumulate_grad_batches 0   ZeroDivisionError in the middle of a run
    gradient_clip_val -1        every gradient reversed
    devices 1000000             a process for each
    max_time "1:00"             a message of Lightning that names no key

What depends on the number of records is checked after they are read (`training/limits.py`).
"""

import os
import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch

from lit_phi2.errors import InputError

# Below these, whatever the records are.
_MINIMUM = {
    "min_epochs": (0, "null has no such limit"),
    "min_steps": (0, "null has no such limit"),
    "accumulate_grad_batches": (1, "1 takes an optimizer step after every micro-batch"),
    "log_every_n_steps": (1, "trainer.logger: false writes no curves"),
    "check_val_every_n_epoch": (1, "trainer.limit_val_batches: 0 validates never"),
    "num_nodes": (1, "1 is this machine alone"),
    "gradient_clip_val": (0, "null or 0 clips nothing"),
    "fast_dev_run": (0, "false or 0 is a whole run, 1 tries one batch"),
}
_CHOICES = {
    "accelerator": ("auto", "cpu", "cuda", "gpu", "mps"),
    "gradient_clip_algorithm": (None, "norm", "value"),
    "profiler": (None, "simple", "advanced", "pytorch"),
}
_PARTS = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches")
_DURATION = "a duration as DD:HH:MM:SS, such as '00:01:30:00', or {hours: 1, minutes: 30}"
_PROCESSES_PER_CORE = 8  # on the CPU; more cannot be meant, and would end the machine's memory


def check_values(trainer: Mapping[str, Any]) -> None:
    """Check each key of the trainer section by itself.

    Raises:
        InputError: names the key, what it has and what to use instead.
    """
    for key, (minimum, instead) in _MINIMUM.items():
        value = trainer[key]
        if value is not None and not value >= minimum:
            raise InputError(f"trainer.{key}: {value} is not at least {minimum}; {instead}.")
    if trainer["accumulate_grad_batches"] >= 2**31:
        raise InputError(f"trainer.accumulate_grad_batches: {trainer['accumulate_grad_batches']} is not below {2**31}.")
    for key, choices in _CHOICES.items():
        value = trainer[key]
        if isinstance(value, str | None) and (value.lower() if value else None) not in choices:
            expected = ", ".join("null" if choice is None else choice for choice in choices)
            raise InputError(f"trainer.{key}: {value!r} is unknown; expected one of {expected}.")
    strategy = trainer["strategy"]
    if isinstance(strategy, str) and strategy != "auto" and not strategy.startswith("ddp"):
        raise InputError(
            f"trainer.strategy: {strategy!r} is not supported here: the frozen base fits one device, so nothing is "
            "sharded. Use auto or ddp."
        )
    _check_end(trainer)
    for key in _PARTS:
        _check_part(f"trainer.{key}", trainer[key])
    if trainer["limit_train_batches"] == 0:
        raise InputError("trainer.limit_train_batches: 0 leaves nothing to train; null or 1.0 takes all batches.")
    _check_val_check_interval(trainer["val_check_interval"], trainer["check_val_every_n_epoch"])
    if trainer["max_time"] is not None and _seconds("trainer.max_time", trainer["max_time"]) <= 0:
        raise InputError(f"trainer.max_time: {trainer['max_time']} leaves no time; expected {_DURATION}, or null.")
    check_devices(trainer["devices"], trainer["accelerator"])
    if trainer["default_root_dir"] is None:
        raise InputError("trainer.default_root_dir: null is no folder; runs is the default.")
    if trainer["model_registry"] is not None:
        raise InputError("trainer.model_registry: must be null; models are uploaded nowhere.")
    if trainer["sync_batchnorm"]:
        raise InputError("trainer.sync_batchnorm: must be false; Phi-2 has no batch norm.")


def _check_end(trainer: Mapping[str, Any]) -> None:
    """Check that a run ends, but not at once."""
    max_epochs, max_steps = trainer["max_epochs"], trainer["max_steps"]
    for key, value in (("max_epochs", max_epochs), ("max_steps", max_steps)):
        if value is not None and value < 1 and value != -1:
            raise InputError(f"trainer.{key}: {value} leaves nothing to train; expected at least 1; -1 has no limit.")
    if max_epochs in (None, -1) and max_steps == -1:
        raise InputError(
            f"trainer.max_epochs: {'null' if max_epochs is None else -1} sets no limit, and trainer.max_steps neither; "
            "the learning-rate schedule needs one of them."
        )
    if max_epochs not in (None, -1) and (trainer["min_epochs"] or 0) > max_epochs:
        raise InputError(f"trainer.min_epochs: {trainer['min_epochs']} is above trainer.max_epochs, {max_epochs}.")
    if max_steps != -1 and (trainer["min_steps"] or 0) > max_steps:
        raise InputError(f"trainer.min_steps: {trainer['min_steps']} is above trainer.max_steps, {max_steps}.")


def _check_part(setting: str, value: float | None) -> None:
    """Check a number of batches, or a fraction of them."""
    if isinstance(value, float) and not 0 <= value <= 1:
        raise InputError(f"{setting}: {value} is no fraction; expected 0.0 to 1.0, or a whole number of batches.")
    if isinstance(value, int) and value < 0:
        raise InputError(f"{setting}: {value} is less than 0; expected a number of batches, or 0.0 to 1.0 of them.")


def _check_val_check_interval(value: Any, every_n_epoch: int | None) -> None:
    setting, expected = "trainer.val_check_interval", "a number of batches, a fraction of an epoch up to 1.0"
    never = "trainer.limit_val_batches: 0 validates never"
    if value is None:
        return
    if isinstance(value, int | float):
        if not value > 0 or (isinstance(value, float) and value > 1):
            raise InputError(f"{setting}: {value} is neither {expected}, nor a duration; {never}.")
        if every_n_epoch is None and isinstance(value, float):
            raise InputError(
                f"{setting}: {value} is a fraction of an epoch, but trainer.check_val_every_n_epoch: null counts over "
                "the epochs; expected a whole number of batches."
            )
    elif _seconds(setting, value) <= 0:
        raise InputError(f"{setting}: {value} is no time; expected {expected}, or {_DURATION}; {never}.")


def _seconds(setting: str, value: Any) -> float:
    """The seconds of a duration in one of Lightning's forms.

    >>> _seconds("trainer.max_time", "01:00:00:10"), _seconds("trainer.max_time", {"minutes": 2})
    (86410.0, 120.0)
    """
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, str) and (match := re.fullmatch(r"(\d+):(\d\d):(\d\d):(\d\d)", value.strip())):
        days, hours, minutes, seconds = map(int, match.groups())
        value = {"days": days, "hours": hours, "minutes": minutes, "seconds": seconds}
    try:
        return timedelta(**value).total_seconds()
    except (TypeError, OverflowError) as error:
        raise InputError(f"{setting}: {value!r} is unknown; expected {_DURATION}.") from error


def check_devices(devices: Any, accelerator: Any) -> None:
    """Check the number of processes on this machine, before the first of them starts.

    Raises:
        InputError: there is none, or there are more than this machine can run.
    """
    name = str(accelerator).lower()
    on_cuda = name in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    on_cpu = name == "cpu" or (name == "auto" and not on_cuda and not torch.backends.mps.is_available())
    text = str(devices).strip()
    if text == "auto" or (text == "-1" and on_cuda) or (not on_cpu and not re.fullmatch(r"-?\d+", text)):
        return  # all cards, or a list of them, which Lightning checks
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise InputError(f"trainer.devices: {text} is no number of processes; expected auto, or at least 1.")
    if on_cpu and int(text) > (cores := os.cpu_count() or 1) * _PROCESSES_PER_CORE:
        raise InputError(f"trainer.devices: {text} processes are too many for {cores} cores; auto starts one process.")
    cards = torch.cuda.device_count() if on_cuda else 1
    if not on_cpu and int(text) > cards and not torch.distributed.is_torchelastic_launched():
        raise InputError(f"trainer.devices: {text} cards were requested, but torch finds {cards}; auto takes all.")
