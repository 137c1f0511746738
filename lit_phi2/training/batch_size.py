"""Batch size: `data.batch_size: auto` -> as many rows in a micro-batch as are of use and fit the device.

    trainer.accumulate_grad_batches 16, so 16 rows in an optimizer step of a process
      memory plan of 1, 2, 4, 8, 16 rows, memory that is free  ->  8 rows
      data.batch_size 8, trainer.accumulate_grad_batches 2     ->  the same optimizer steps

Only divisors of the rows of a step are tried. A run's config.yaml and checkpoints hold the numbers, and a resumed run
takes them from there, whatever the device has free by then.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import psutil
import torch
import yaml

from lit_phi2.data.arguments import AUTO
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.errors import InputError
from lit_phi2.generation.weights import available_memory
from lit_phi2.model.device import card_memory, choose_dtype
from lit_phi2.pretrained import read_model_config, resolve_base_model
from lit_phi2.training.memory_plan import changes_to_fit, plan_fit
from lit_phi2.training.memory_report import format_bytes, program_bytes, workload
from lit_phi2.training.memory_terms import PhiSizes, Workload
from lit_phi2.training.module import LitPhi2
from lit_phi2.training.run_folder import all_ranks_run

log = logging.getLogger(__name__)

USABLE = 0.9  # of the free memory: the plan is within 10 %, and allocators leave gaps
# Tokens of a micro-batch beyond which a device multiplies no faster.
ENOUGH_TOKENS = {"cuda": 16384, "mps": 2048, "cpu": 512}
ROWS_VARIABLE = "LIT_PHI2_BATCH_SIZE"  # passes the choice of rank 0 to processes that Lightning starts


def use_batch_size(trainer: pl.Trainer, model: LitPhi2, data: ClaimsDataModule, run: Mapping[str, Any] | None) -> None:
    """Set the rows of a micro-batch and the micro-batches of a step, where data.batch_size is auto.

    Args:
        trainer: whose accumulate_grad_batches is the rows of a step, before it is divided.
        model: of the run.
        data: set up for fit.
        run: fingerprint in the checkpoint that fit continues from; None for a new run.

    Raises:
        InputError: not even one row fits, or a setting counts micro-batches.
    """
    if not _is_auto(data):
        return
    step_rows = data.batch_size * trainer.accumulate_grad_batches
    if run is not None:
        rows = int(run["data.batch_size"])
        log.info("data.batch_size: %d, as in the checkpoint", rows)
    else:
        _check_counts(trainer)
        rows = agreed_rows(trainer, partial(_choose, trainer, model, data, step_rows))
    if step_rows % rows == 0:
        data.batch_size, trainer.accumulate_grad_batches = rows, step_rows // rows


def with_batch_size(config: str, trainer: pl.Trainer, data: ClaimsDataModule) -> str:
    """The config of a run with the numbers in the place of auto."""
    if not _is_auto(data):
        return config
    header = [line for line in config.splitlines(keepends=True) if line.startswith("#")]
    settings = yaml.safe_load(config)
    settings["data"]["batch_size"] = data.batch_size
    settings["trainer"]["accumulate_grad_batches"] = trainer.accumulate_grad_batches
    return "".join(header) + yaml.safe_dump(settings, sort_keys=False)


def choose_rows(phi: PhiSizes, work: Workload, step_rows: int, program: int, memory: int) -> int:
    """The largest divisor of the rows of a step that fits, of those that have no more than ENOUGH_TOKENS.

    Args:
        phi: sizes of the base.
        work: of the run; its rows do not count.
        step_rows: rows of an optimizer step of a process.
        program: bytes of everything that is neither weights nor tensors.
        memory: bytes that may be used.

    Returns:
        0 if not even one row fits.
    """
    most = max(1, ENOUGH_TOKENS[work.device_type] // work.row_length)
    fitting = [
        rows
        for rows in range(1, min(step_rows, most) + 1)
        if step_rows % rows == 0 and plan_fit(phi, replace(work, rows=rows), program, memory).needed <= memory
    ]
    return max(fitting, default=0)


def _is_auto(data: Any) -> bool:
    return bool(data.arguments["batch_size"] == AUTO)


def _check_counts(trainer: pl.Trainer) -> None:
    """Refuse settings that count micro-batches, whose number the user cannot know."""
    for name in ("limit_train_batches", "limit_val_batches", "overfit_batches", "val_check_interval"):
        value = getattr(trainer, name)
        if isinstance(value, int) and value > 0 and not trainer.fast_dev_run:
            raise InputError(
                f"trainer.{name}: {value} counts micro-batches, and data.batch_size: auto chooses how many rows these "
                "have. Give a fraction, or a number of rows in data.batch_size."
            )


@dataclass(frozen=True, slots=True)
class RowsChoice:
    """What a rank would take.

    Attributes:
        rows: of a micro-batch; 0 if not even one fits.
        text: why; with 0 rows what would fit.
    """

    rows: int
    text: str


def smallest(choices: Sequence[RowsChoice]) -> RowsChoice:
    """The choice that fits every rank.

    Raises:
        InputError: not even one row fits one of them; names what would.
    """
    choice = min(choices, key=lambda choice: choice.rows)
    if not choice.rows:
        raise InputError(f"data.batch_size: auto: {choice.text}")
    return choice


def agreed_rows(trainer: pl.Trainer, choose: Callable[[], RowsChoice]) -> int:
    """The smallest choice of all ranks; that of rank 0 where Lightning starts the others later, on equal cards."""
    if not trainer.is_global_zero and ROWS_VARIABLE in os.environ:
        return int(os.environ[ROWS_VARIABLE])
    if all_ranks_run(trainer):
        trainer.strategy.setup_environment()
        choice = smallest(gather_choices(choose(), trainer.world_size))
    elif trainer.is_global_zero:
        choice = smallest([choose()])
        if trainer.world_size > 1:
            os.environ[ROWS_VARIABLE] = str(choice.rows)  # the other ranks inherit it
    else:
        return 1  # of several machines without torchrun, which is refused later
    if trainer.is_global_zero:
        log.info("data.batch_size: auto takes %s", choice.text)
    return choice.rows


def gather_choices(choice: RowsChoice, world_size: int) -> list[RowsChoice]:
    """The choices of all ranks, on every rank."""
    choices: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(choices, choice)
    return choices


def _choose(trainer: pl.Trainer, model: LitPhi2, data: ClaimsDataModule, step_rows: int) -> RowsChoice:
    """Choose on this device."""
    device = model.target_device()
    phi = PhiSizes.from_config(read_model_config(resolve_base_model(model.base)))
    dtype = choose_dtype(model.compute_dtype, device, phi.num_parameters)[0]
    work = replace(workload(model, data, dtype, device.type, card_memory(device)), rows=1)
    program, memory = program_bytes(device), int(USABLE * _free_bytes(device, trainer.num_devices))
    rows = choose_rows(phi, work, step_rows, program, memory)
    needed = format_bytes(plan_fit(phi, replace(work, rows=max(1, rows)), program, memory).needed)
    if not rows:
        changes = changes_to_fit(phi, work, program, memory)
        advice = f"Set {', '.join(changes)}." if changes else "Take a smaller base."
        return RowsChoice(
            0,
            f"one row of {work.row_length:,} tokens needs {needed}, and {USABLE:.0%} of what is free on {device} is "
            f"{format_bytes(memory)}. {advice}",
        )
    enough = max(ENOUGH_TOKENS[device.type], work.row_length)
    return RowsChoice(
        rows,
        f"{rows} of the {step_rows} rows of an optimizer step at once, so accumulate_grad_batches is "
        f"{step_rows // rows}: {needed} planned, {format_bytes(memory)} usable on {device}; {enough} tokens at once "
        "are enough there",
    )


def _free_bytes(device: torch.device, num_processes: int) -> int:
    """What a run can have now: of a card what others leave, of a machine its share."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return (available_memory(device) + int(psutil.Process().memory_info().rss)) // num_processes
