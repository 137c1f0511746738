"""Checkpoints: last.ckpt and the best by val/loss, written at the end of an optimizer step's window and nowhere else.

    checkpoints/last.ckpt    after every validation and every epoch, so often as the config says, and when asked to stop
    checkpoints/best.ckpt    the one with the lowest val/loss, measured on just these weights
    adapter/                 the best, in PEFT form, at the end of fit

Inside a window the gradients gathered so far would be lost, so whatever asks for a checkpoint or for a stop there
(max_time, early stopping, a signal, the clock) waits for the window's end. And before a validation the run would go on
without it, so what is asked for right before one waits until it is over.
"""

import io
import logging
import math
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from lit_phi2.adapters.checkpoint import read_adapter
from lit_phi2.adapters.peft_format import save_adapter
from lit_phi2.errors import RunInterrupted
from lit_phi2.utils.files import atomic_write

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, and nowhere but into its folder: Lightning's passes through /tmp."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        atomic_write(Path(path), buffer.getvalue())


class AdapterCheckpoint(Checkpoint):
    """Keeps the last and the best state of a run, and stops it cleanly.

    Args:
        folder: of the run.
        every_n_steps: optimizer steps from one last.ckpt to the next, at most; None for as many as there are.
        every_minutes: likewise in time.
    """

    def __init__(self, folder: Path, *, every_n_steps: int | None = None, every_minutes: float | None = None) -> None:
        self.folder = folder
        self.every_n_steps = every_n_steps
        self.every_minutes = every_minutes
        self.last = folder / "checkpoints" / "last.ckpt"
        self.best = folder / "checkpoints" / "best.ckpt"
        self.best_loss = math.inf
        self._step = 0
        self._written_at_step = 0
        self._written_at = time.monotonic()
        self._is_best = False
        self._stop_at_window_end = False
        self._signal = 0
        self._handlers: dict[signal.Signals, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"best_loss": self.best_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_loss = state_dict["best_loss"]

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._install_handlers()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = self._written_at_step = trainer.global_step
        self._written_at = time.monotonic()
        self._install_handlers()
        if self._signal:
            raise RunInterrupted("stopped before the first step; there is nothing to save.", self._signal)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        window_ended = trainer.global_step > self._step
        self._step = trainer.global_step
        if not window_ended:
            if trainer.should_stop:
                trainer.should_stop, self._stop_at_window_end = False, True
            return
        if self._stop_at_window_end:
            trainer.should_stop = True
        if 0 < trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True  # as the module will, whose hook comes after this one
        if _epoch_ended(trainer) or _validation_follows(trainer):
            return  # written in on_train_epoch_end, once the loops have counted the epoch, or in on_validation_end
        if self._agree(trainer, self._is_due()) or self._signal or trainer.should_stop:
            self._write(trainer)
        self._raise_if_interrupted(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        loss = float(trainer.callback_metrics.get("val/loss", math.nan))
        if loss < self.best_loss:
            self.best_loss = loss
            self._is_best = True
        if not _epoch_ended(trainer):
            self._write(trainer)
            self._raise_if_interrupted(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if _epoch_ended(trainer):  # else it was stopped inside the epoch, and written then
            self._write(trainer)
            self._raise_if_interrupted(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore_handlers()

    def export(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the best adapter; fit calls it last, also where a resumed run finds that all steps were taken.

        Lightning calls no hook of training then, and the run may have been killed in here.
        """
        if not trainer.is_global_zero:
            return
        source = self.best if self.best.is_file() else self.last
        adapter = read_adapter(source) if source.is_file() else pl_module.trained_adapter()
        save_adapter(adapter, self.folder / "adapter")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def _agree(self, trainer: pl.Trainer, due: bool) -> bool:
        """Whether a checkpoint is due on any rank; a signal that reached one of them has then reached all."""
        if trainer.world_size == 1:
            return due
        asked = torch.tensor([self._signal, int(due)], device=trainer.strategy.root_device)
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        self._signal, due_anywhere = asked.tolist()
        return bool(due_anywhere)

    def _is_due(self) -> bool:
        steps, minutes = self._step - self._written_at_step, (time.monotonic() - self._written_at) / 60
        return (self.every_n_steps is not None and steps >= self.every_n_steps) or (
            self.every_minutes is not None and minutes >= self.every_minutes
        )

    def _write(self, trainer: pl.Trainer) -> None:
        """The state, and before it the best: a kill between the two goes back to a time when the best was not yet."""
        for logger in trainer.loggers:
            logger.save()  # what the curves hold up to here must be there if the run goes on from here
        first, second = (self.best, self.last) if self._is_best else (self.last, None)
        trainer.save_checkpoint(first, weights_only=False)  # rank 0 writes, the others wait for it
        if second is not None and trainer.is_global_zero:
            atomic_write(second, first.read_bytes())
        self._is_best = False
        self._written_at_step, self._written_at = self._step, time.monotonic()

    def _install_handlers(self) -> None:
        """From Lightning, which set its own by now: those act inside a window, and exit with other codes."""
        for number in (signal.SIGINT, signal.SIGTERM):
            if number not in self._handlers:
                self._handlers[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends the run at once; the last checkpoint stays
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        log.info("stopping after this optimizer step; once more to stop at once")

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def _raise_if_interrupted(self, trainer: pl.Trainer) -> None:
        self._agree(trainer, False)
        if self._signal:
            raise RunInterrupted(
                f"stopped and saved. To continue: python -m lit_phi2 fit --config {self.folder / 'config.yaml'} "
                f"--ckpt_path {self.last}",
                self._signal,
            )


def _epoch_ended(trainer: pl.Trainer) -> bool:
    return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch or (
        trainer.fit_loop.epoch_loop.batch_progress.current.ready >= trainer.num_training_batches
    )


def _validation_follows(trainer: pl.Trainer) -> bool:
    """Whether Lightning validates right after this micro-batch; there is no public way to ask."""
    loop = trainer.fit_loop
    return bool(trainer.enable_validation and loop.epoch_loop._should_check_val_fx(loop._data_fetcher))
