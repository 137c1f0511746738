"""Predictions: one object a record, in the order of the input, without the prompt.

    {"id", "instruction", "input", "response", "prediction", "finish_reason", "new_tokens"}

Prompts are answered shortest first, so that a batch is padded little; the order is restored here.
"""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lit_phi2.batch import PromptBatch
from lit_phi2.files import replace_file
from lit_phi2.generation import Answer


class PredictionWriter(Callback):
    """Collects answers and writes them when all are there. The CLI drops what `predict` returns, so this must keep it.

    Args:
        file: to write, replaced if it exists.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.answers: dict[int, Answer] = {}

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: PromptBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.answers.update(zip(batch.indices, outputs, strict=True))

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data = trainer.datamodule
        lines = []
        for index, answer in sorted(self.answers.items()):
            record = data.splits["predict"].records[index]
            prediction = {
                "id": record.id,
                "instruction": record.instruction,
                "input": record.input,
                "response": record.response,
                "prediction": data.tokenizer.decode(answer.ids),
                "finish_reason": answer.finish_reason,
                "new_tokens": len(answer.ids),
            }
            lines.append(json.dumps(prediction, ensure_ascii=False) + "\n")
        replace_file(self.file, lambda path: path.write_text("".join(lines), "utf-8"))
