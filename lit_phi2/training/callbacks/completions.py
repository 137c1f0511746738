"""TestCompletions: after `test` has measured the loss, complete the same records with the adapter and with the base.

    prompts of the test records  ->  {"adapter": [Completion, ...], "base": [Completion, ...]}
                                     without an adapter: {"base": [...]}

Every rank completes a part of the prompts; afterwards all ranks hold all completions, in the order of the records.
`training/scoring.py` scores them when the run is over.
"""

import logging

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from lit_phi2.generation.engine import Completion
from lit_phi2.generation.feed import feed
from lit_phi2.training.completion_progress import CompletionProgress
from lit_phi2.training.outputs import CompletionSummary, describe_end
from lit_phi2.training.protocols import training_data

log = logging.getLogger(__name__)


class TestCompletions(Callback):
    """Collects greedy completions of the first `count` test records, or of all.

    Args:
        has_adapter: the model has a trained adapter, so base and adapter are compared.
        count: None for all records.
        show_progress: whether rank 0 shows how many of its records are completed.
    """

    __test__ = False  # pytest collects classes by the prefix Test

    def __init__(self, *, has_adapter: bool, count: int | None = None, show_progress: bool = True) -> None:
        self.has_adapter = has_adapter
        self.count = count
        self.show_progress = show_progress
        self.completions: dict[str, list[Completion]] = {}

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.has_adapter:
            self.completions["adapter"] = self._complete(trainer, pl_module, "the adapter")
            with pl_module.phi.disable_adapter():
                self.completions["base"] = self._complete(trainer, pl_module, "the base")
        else:
            self.completions["base"] = self._complete(trainer, pl_module, "the base")

    def _complete(self, trainer: pl.Trainer, pl_module: pl.LightningModule, model_name: str) -> list[Completion]:
        batches = (
            training_data(trainer).prompt_batches("test", self.count).share(trainer.global_rank, trainer.world_size)
        )
        total = len(batches.indices)
        shown = self.show_progress and trainer.is_global_zero
        progress = CompletionProgress(f"completed by {model_name}", total, enabled=shown)
        prompts = (pair for batch in batches for pair in zip(batch.indices, batch.prompts, strict=True))
        completions: dict[int, Completion] = {}
        for index, completion in feed(pl_module.new_engine(total), prompts):
            completions[index] = completion
            progress.add(len(completion.ids))
        progress.close()
        if trainer.world_size > 1:
            gathered: list[dict[int, Completion]] = [{}] * trainer.world_size
            torch.distributed.all_gather_object(gathered, completions)
            completions = {index: completion for part in gathered for index, completion in part.items()}
        summary = CompletionSummary()
        for completion in completions.values():
            summary.add(describe_end(completion))
        log.info("%s: %s", model_name, summary.describe(progress.seconds))
        if warning := summary.repetition_warning():
            log.warning("%s: %s", model_name, warning)
        return [completions[index] for index in range(len(completions))]
