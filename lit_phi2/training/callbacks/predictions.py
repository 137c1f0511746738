"""Predictions: one object a record, in the order of the input, without the prompt.

    predictions.jsonl.part    a header, then what was answered so far, batch by batch as it came, with its index
    predictions.jsonl         {"id", "instruction", "input", "response", "prediction", "finish_reason", "new_tokens"}

Prompts are answered shortest first, so that a batch is padded little; the order is restored here, at the end. A predict
that was killed goes on from its .part, if the same model answers the same prompts.
"""

import glob
import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray

from lit_phi2.types import PromptBatch
from lit_phi2.utils.files import atomic_write


class PredictionWriter(Callback):
    """Appends answers as they come, and at the end sorts them into the file.

    Args:
        file: to write, replaced if it exists.
        identity: what decides the answers: model and prompts.
    """

    def __init__(self, file: Path, identity: dict[str, Any]) -> None:
        self.file = file
        self.header = json.dumps(identity, sort_keys=True) + "\n"
        self.written = 0
        self.cut = 0

    def read_completed(self) -> NDArray[np.int64]:
        """The indices that an earlier predict of the same identity has answered; a .part of another is removed."""
        completed = array("q")  # numbers side by side here and below, since there may be millions
        for part in self._parts():
            whole = 0  # bytes: a kill may have cut the last line
            with part.open("rb") as file:
                if file.readline() == self.header.encode():
                    whole = len(self.header.encode())
                    for line in file:
                        if not line.endswith(b"\n"):
                            break
                        completed.append(json.loads(line)["index"])
                        whole += len(line)
            if whole:
                with part.open("r+b") as file:
                    file.truncate(whole)
            else:
                part.unlink(missing_ok=True)  # every rank reads and tidies them
        return np.array(completed, np.int64)

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: PromptBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        data = trainer.datamodule
        part = self._part(trainer.global_rank)
        lines = [] if part.is_file() else [self.header]
        for index, answer in zip(batch.indices, outputs, strict=True):
            record = data.splits["predict"].records[index]
            prediction = {
                "index": index,
                "id": record.id,
                "instruction": record.instruction,
                "input": record.input,
                "reference": record.response,
                "completion": data.tokenizer.decode(answer.ids),
                "finish_reason": answer.finish_reason,
                "new_tokens": len(answer.ids),
            }
            lines.append(json.dumps(prediction, ensure_ascii=False) + "\n")
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as file:
            file.write("".join(lines).encode())

    def finish(self) -> None:
        """Sort what all parts hold into the file, then remove them."""
        parts = self._parts()
        places = array("q")  # index, part and offset of each line, since the texts may be more than memory holds
        for number, part in enumerate(parts):
            offset = len(self.header.encode())
            with part.open("rb") as file:
                file.seek(offset)
                for line in file:
                    places.extend((json.loads(line)["index"], number, offset))
                    offset += len(line)
        atomic_write(self.file, self._sorted(parts, np.array(places, np.int64).reshape(-1, 3)))
        for part in parts:
            part.unlink(missing_ok=True)

    def _sorted(self, parts: list[Path], places: NDArray[np.int64]) -> Iterator[str]:
        """The lines in the order of their indices; what two runs at once have answered twice, once."""
        files = [part.open("rb") for part in parts]
        try:
            for row in np.unique(places[:, 0], return_index=True)[1].tolist():
                _, number, offset = places[row].tolist()
                file = files[number]
                file.seek(offset)
                prediction = json.loads(file.readline())
                del prediction["index"]
                self.written += 1
                self.cut += prediction["finish_reason"] == "length"
                yield json.dumps(prediction, ensure_ascii=False) + "\n"
        finally:
            for file in files:
                file.close()

    def _part(self, rank: int) -> Path:
        """Each process has its own."""
        return self.file.with_name(f"{self.file.name}.part{rank or ''}")

    def _parts(self) -> list[Path]:
        return sorted(self.file.parent.glob(f"{glob.escape(self.file.name)}.part*"))
