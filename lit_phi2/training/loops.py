"""Loops: Lightning's epoch of micro-batches, except that it validates where an optimizer step ends and nowhere else.

    micro-batch     1  2  3 | 4  5  6 | 7        windows of three
    Lightning's           v      v      v        val_check_interval 2: some inside a window
    ours                  v        v  v

Inside a window the weights are those of the step before, so its figures would say nothing new, and a checkpoint of them
could not be gone on from.
"""

from typing import Any

from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop


class StepAlignedEpochLoop(_TrainingEpochLoop):
    """A validation that falls due inside a window waits for its end. Put in the place of Lightning's own."""

    def _should_check_val_fx(self, data_fetcher: Any) -> bool:
        if self._should_accumulate():
            return False
        if super()._should_check_val_fx(data_fetcher):
            return True
        interval, accumulate = self.trainer.val_check_batch, self.trainer.accumulate_grad_batches
        by_count = self.trainer._val_check_time_interval is None and isinstance(interval, int)
        if not by_count or not self._should_check_val_epoch():
            return False
        window = self.batch_progress.current.ready % accumulate or accumulate
        count = (self.total_batch_idx if self.trainer.check_val_every_n_epoch is None else self.batch_idx) + 1
        return bool(count // interval > (count - window) // interval)
