"""Answers: after test has measured the loss, answer the same records, with the adapter and without it.

    prompts of the test records -> {"adapter": [Answer, ...], "base": [Answer, ...]}       without a checkpoint: "base"

What the answers are worth is counted in `quality.py`, when the run is over.
"""

import logging

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from lit_phi2.generation.engine import Completion

log = logging.getLogger(__name__)


class TestCompletions(Callback):
    """Collects greedy answers to the first `count` test records, or to all.

    Args:
        adapted: whether the model carries a trained adapter; if so the base answers too.
        count: of records.
    """

    __test__ = False  # not a test, whatever pytest makes of the name

    def __init__(self, *, adapted: bool, count: int | None = None) -> None:
        self.adapted = adapted
        self.count = count
        self.answers: dict[str, list[Completion]] = {}

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.adapted:
            self.answers["adapter"] = self._answer(trainer, pl_module, "with the adapter")
            with pl_module.phi.disable_adapter():
                self.answers["base"] = self._answer(trainer, pl_module, "by the base alone")
        else:
            self.answers["base"] = self._answer(trainer, pl_module, "by the base")

    def _answer(self, trainer: pl.Trainer, pl_module: pl.LightningModule, how: str) -> list[Completion]:
        batches = trainer.datamodule.prompt_batches("test", self.count)
        total = sum(len(batch.indices) for batch in batches)
        answers: dict[int, Completion] = {}
        for batch in batches[trainer.global_rank :: trainer.world_size]:
            answers.update(zip(batch.indices, pl_module.generate(batch.prompts), strict=True))
            log.info("answered %s: %d of %d records", how, len(answers), total)
        if trainer.world_size > 1:
            gathered: list[dict[int, Completion]] = [{}] * trainer.world_size
            torch.distributed.all_gather_object(gathered, answers)
            answers = {index: answer for part in gathered for index, answer in part.items()}
        return [answers[index] for index in range(total)]
