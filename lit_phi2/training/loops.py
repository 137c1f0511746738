"""Loops: Lightning's epoch of micro-batches, except that it validates only at the end of an optimizer step.

    micro-batch     1  2  3 | 4  5  6 | 7        accumulation windows of three
    Lightning's           v      v      v        val_check_interval 2: validations inside a window
    ours                  v        v  v

Inside a window the weights are those of the step before, so a validation would repeat its metrics, and a checkpoint
written there could not be resumed.
"""

from typing import Any

from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop


class StepAlignedEpochLoop(_TrainingEpochLoop):
    """Replaces Lightning's epoch loop: a validation due inside an accumulation window waits for the window's end."""

    def _should_check_val_fx(self, data_fetcher: Any) -> bool:
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
