"""Checkpoints: last.ckpt, and the best by val/loss, written only at the end of an optimizer step.

    checkpoints/last.ckpt    after every validation and epoch, every n steps or minutes, and when a signal stops the run
    checkpoints/best.ckpt    the one with the lowest val/loss, measured on exactly these weights
    adapter/                 the best in PEFT form, at the end of fit

Inside an accumulation window a checkpoint would lose the gradients so far. So a checkpoint or a stop that is requested
there (max_time, early stopping, the clock) waits for the end of the window. A run resumed from a checkpoint written
right before a validation would skip that validation, so such a checkpoint waits until the validation is over.

A signal does not wait. Inside a window the checkpoint is that of the last step, and the resumed run begins the window
again (with several processes, it waits for the window's end, where they agree). Inside a validation the checkpoint says
that the validation is due.
"""

import io
import logging
import math
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from lit_phi2.adapters.checkpoint import read_checkpoint
from lit_phi2.adapters.peft_format import ADAPTER_FILES, save_adapter
from lit_phi2.audit.ledger import LEDGER_FILE
from lit_phi2.audit.provenance import (
    CONFIG_FILE,
    PROVENANCE_FILE,
    adapter_predicate,
    embedded_metadata,
    run_predicate,
    write_provenance,
)
from lit_phi2.errors import RunInterrupted
from lit_phi2.utils.console import shell_command
from lit_phi2.utils.files import atomic_write
from lit_phi2.utils.signals import stop_request

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint completely or not at all, and only into its folder: Lightning's goes through /tmp."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        atomic_write(Path(path), buffer.getvalue())


class AdapterCheckpoint(Checkpoint):
    """Writes the last and the best checkpoint of a run, and stops the run cleanly on a signal.

    Args:
        folder: of the run.
        every_n_steps: the most optimizer steps between two checkpoints; None for no limit.
        every_minutes: the most minutes between two checkpoints; None for no limit.
    """

    def __init__(self, folder: Path, *, every_n_steps: int | None = None, every_minutes: float | None = None) -> None:
        self.folder = folder
        self.every_n_steps = every_n_steps
        self.every_minutes = every_minutes
        self.last = folder / "checkpoints" / "last.ckpt"
        self.best = folder / "checkpoints" / "best.ckpt"
        self.best_loss = math.inf
        self._step = 0
        self._last_write_step = 0
        self._last_write_time = time.monotonic()
        self._is_best = False
        self._stop_requested = False

    def state_dict(self) -> dict[str, Any]:
        return {"best_loss": self.best_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_loss = state_dict["best_loss"]

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        stop_request.deferred = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = self._last_write_step = trainer.global_step
        self._last_write_time = time.monotonic()
        stop_request.deferred = True
        self._raise_if_interrupted(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        window_ended = trainer.global_step > self._step
        self._step = trainer.global_step
        if not window_ended:
            if trainer.should_stop:
                trainer.should_stop, self._stop_requested = False, True
            if trainer.world_size == 1 and stop_request.number:
                self._stop_inside_window(trainer)
            return
        if self._stop_requested:
            trainer.should_stop = True
        if 0 < trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True  # as the module does, in its hook after this one
        if _epoch_ended(trainer) or _validation_follows(trainer):
            return  # on_train_epoch_end writes after the loops have counted the epoch, or on_validation_end does
        number, due = self._agree(trainer, self._is_due())
        if due or number or trainer.should_stop:
            self._write(trainer)
        self._raise_if(number, trainer)

    def _stop_inside_window(self, trainer: pl.Trainer) -> None:
        """Stop now: the weights are those of the last step, and a resumed run begins this window again."""
        if trainer.global_step:
            self._write(trainer)
        self._raise_if_interrupted(trainer)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.state.fn != "fit":
            return
        number, _ = self._agree(trainer)
        if number and not trainer.sanity_checking:
            trainer.fit_loop.epoch_loop.validation_due = True
            self._write(trainer)
        self._raise_if(number, trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        if trainer.sanity_checking:
            self._raise_if_interrupted(trainer)
            return
        loss = float(trainer.callback_metrics.get("val/loss", math.nan))
        if loss < self.best_loss:
            self.best_loss = loss
            self._is_best = True
        if not _epoch_ended(trainer):
            self._write(trainer)
            self._raise_if_interrupted(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if _epoch_ended(trainer):  # otherwise the run stopped inside the epoch, and was written there
            self._write(trainer)
            self._raise_if_interrupted(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._raise_if_interrupted(trainer)
        stop_request.message = self._stop_message(trainer)  # the adapter is not exported yet
        stop_request.deferred = False

    def export(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the best adapter in PEFT form, and the provenance of the run; fit calls this last.

        Not a hook: a run killed in here resumes with all steps taken, and Lightning then calls no training hook.
        """
        if not trainer.is_global_zero:
            return
        source = self.best if self.best.is_file() else self.last
        if source.is_file():
            adapter, checkpoint = read_checkpoint(source)
            predicate = run_predicate(checkpoint, self.folder)
        else:
            adapter = pl_module.trained_adapter()
            predicate = adapter_predicate(adapter, adapter.base)
        save_adapter(adapter, self.folder / "adapter", embedded_metadata(predicate))
        write_provenance(self.folder / "adapter", predicate, ADAPTER_FILES)
        names = [f"adapter/{name}" for name in ADAPTER_FILES]
        others = ("checkpoints/best.ckpt", "checkpoints/last.ckpt", CONFIG_FILE, LEDGER_FILE)
        write_provenance(self.folder, predicate, [*names, *(name for name in others if (self.folder / name).is_file())])

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        stop_request.deferred = False

    def _agree(self, trainer: pl.Trainer, due: bool = False) -> tuple[int, bool]:
        """The number of a signal that reached any rank, or 0, and whether a checkpoint is due on any rank.

        Every rank calls it at the same points and decides by what it returns, so that all write and stop together.
        """
        if trainer.world_size == 1:
            return stop_request.number, due
        requests = torch.tensor([stop_request.number, int(due)], device=trainer.strategy.root_device)
        torch.distributed.all_reduce(requests, torch.distributed.ReduceOp.MAX)
        number, any_due = requests.tolist()
        return number, bool(any_due)

    def _raise_if_interrupted(self, trainer: pl.Trainer) -> None:
        self._raise_if(self._agree(trainer)[0], trainer)

    def _raise_if(self, number: int, trainer: pl.Trainer) -> None:
        if number:
            raise RunInterrupted(self._stop_message(trainer), number)

    def _stop_message(self, trainer: pl.Trainer) -> str:
        return stop_message(trainer.global_step, self.last) if trainer.global_step else NOTHING_SAVED

    def _is_due(self) -> bool:
        steps, minutes = self._step - self._last_write_step, (time.monotonic() - self._last_write_time) / 60
        return (self.every_n_steps is not None and steps >= self.every_n_steps) or (
            self.every_minutes is not None and minutes >= self.every_minutes
        )

    def _write(self, trainer: pl.Trainer) -> None:
        """Write best.ckpt before last.ckpt: after a kill between them, the older last.ckpt finds the best again."""
        for logger in trainer.loggers:
            logger.save()  # a resumed run does not write the scalars up to this step again
        if trainer.is_global_zero:
            (self.folder / PROVENANCE_FILE).unlink(missing_ok=True)  # of an earlier end; export writes it again
        first, second = (self.best, self.last) if self._is_best else (self.last, None)
        trainer.save_checkpoint(first, weights_only=False)  # rank 0 writes, the other ranks wait
        if second is not None and trainer.is_global_zero:
            atomic_write(second, first.read_bytes())
        self._is_best = False
        self._last_write_step, self._last_write_time = self._step, time.monotonic()


NOTHING_SAVED = "stopped before the first optimizer step; nothing is saved yet."


def stop_message(step: int, last: Path) -> str:
    """What fit says when a signal stops it.

    Args:
        step: that `last` holds.
        last: checkpoints/last.ckpt of the run.
    """
    config = last.parents[1] / "config.yaml"
    command = shell_command("python", "-m", "lit_phi2", "fit", "--config", config, "--ckpt_path", last)
    return f"stopped after optimizer step {step}, which is saved. To continue:\n    {command}"


def _epoch_ended(trainer: pl.Trainer) -> bool:
    return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch or (
        trainer.fit_loop.epoch_loop.batch_progress.current.ready >= trainer.num_training_batches
    )


def _validation_follows(trainer: pl.Trainer) -> bool:
    """Whether Lightning validates right after this micro-batch; Lightning has no public method for this."""
    loop = trainer.fit_loop
    return bool(trainer.enable_validation and loop.epoch_loop._should_check_val_fx(loop._data_fetcher))
