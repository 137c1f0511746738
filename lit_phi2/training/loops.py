"""Loops: Lightning's, but they validate only at the end of an optimizer step, and resume inside a validation.

    micro-batch     1  2  3 | 4  5  6 | 7        accumulation windows of three
    Lightning's           v      v      v        val_check_interval 2: validations inside a window
    ours                  v        v  v

Inside a window the weights are those of the step before, so a validation would repeat its metrics.

A run that is stopped inside a validation saves `validation_due`, and when it is resumed it validates before it trains
on. Lightning's own loops would continue with the next step.
"""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop


def use_resumable_loops(trainer: pl.Trainer) -> None:
    """Replace the training loops of any Trainer, with their state."""
    trainer.fit_loop.__class__ = ResumableFitLoop
    trainer.fit_loop.epoch_loop.__class__ = ResumableEpochLoop


def new_loops(trainer: pl.Trainer) -> "ResumableFitLoop":
    """Training loops at step 0, with the limits of the Trainer."""
    loop = ResumableFitLoop(trainer, trainer.min_epochs, trainer.max_epochs)
    loop.epoch_loop = ResumableEpochLoop(trainer, trainer.min_steps, trainer.max_steps)
    return loop


class ResumableFitLoop(_FitLoop):
    """Epochs, until all steps are taken and no validation is due."""

    @property
    def done(self) -> bool:
        return not self.epoch_loop.validation_due and bool(super().done)


class ResumableEpochLoop(_TrainingEpochLoop):
    """Micro-batches of an epoch; a validation due inside an accumulation window waits for the window's end.

    Attributes:
        validation_due: the run was stopped inside the validation at this step.
    """

    validation_due = False
    _validate_now = False

    def on_save_checkpoint(self) -> dict[str, Any]:
        return {**super().on_save_checkpoint(), "validation_due": self.validation_due}

    def on_load_checkpoint(self, state_dict: dict[str, Any]) -> None:
        super().on_load_checkpoint(state_dict)
        self.validation_due = state_dict.get("validation_due", False)

    @property
    def done(self) -> bool:
        return not self.validation_due and bool(super().done)

    def advance(self, data_fetcher: Any) -> None:
        if self.validation_due:
            self.val_loop.restarting = False  # from its first batch
        else:
            super().advance(data_fetcher)

    def on_advance_end(self, data_fetcher: Any) -> None:
        self._validate_now, self.validation_due = self.validation_due, False
        super().on_advance_end(data_fetcher)
        self._validate_now = False

    def _should_check_val_fx(self, data_fetcher: Any) -> bool:
        if self._validate_now:
            return True
        if self._should_accumulate():
            return False
        if super()._should_check_val_fx(data_fetcher):
            return True
        interval, accumulate = self.trainer.val_check_batch, self.trainer.accumulate_grad_batches
        counts_batches = self.trainer._val_check_time_interval is None and isinstance(interval, int)
        if not counts_batches or not self._should_check_val_epoch():
            return False
        window_size = self.batch_progress.current.ready % accumulate or accumulate  # the last window may be shorter
        num_batches = (self.total_batch_idx if self.trainer.check_val_every_n_epoch is None else self.batch_idx) + 1
        return bool(num_batches // interval > (num_batches - window_size) // interval)
