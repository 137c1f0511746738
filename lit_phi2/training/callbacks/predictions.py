"""PredictionWriter: one object a record, in the order of the input.

    predictions.jsonl.part    a fingerprint, then one line a completion with its index, in the order of generation
    predictions.jsonl         {"id", "instruction", "input", "reference", "completion", "finish_reason", "new_tokens"}

Prompts are completed shortest first, so that batches have little padding; `finish` restores the order. A predict that
was killed continues from its .part file, if the fingerprint shows the same model and the same prompts.
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
from transformers import PreTrainedTokenizerBase

from lit_phi2.data.records import Record
from lit_phi2.generation.engine import Completion
from lit_phi2.training.protocols import tokenizer_of, training_data
from lit_phi2.types import PromptBatch
from lit_phi2.utils.files import atomic_write


class PredictionWriter(Callback):
    """Appends completions to a .part file of each rank, and at the end sorts them into the file.

    Args:
        file: to write, replaced if it exists.
        fingerprint: everything that decides the completions: model and prompts.

    Attributes:
        num_completions: written to the file.
        num_at_limit: those that stopped at max_new_tokens.
    """

    def __init__(self, file: Path, fingerprint: dict[str, Any]) -> None:
        self.file = file
        self.header = json.dumps(fingerprint, sort_keys=True) + "\n"
        self.num_completions = 0
        self.num_at_limit = 0

    def read_completed(self) -> NDArray[np.int64]:
        """Indices that an earlier predict with this fingerprint completed; other .part files are removed."""
        completed = array("q")  # packed int64 here and below: there may be millions
        for part in self._parts():
            valid_bytes = 0  # a kill may have cut the last line short
            with part.open("rb") as file:
                if file.readline() == self.header.encode():
                    valid_bytes = len(self.header.encode())
                    for line in file:
                        if not line.endswith(b"\n"):
                            break
                        completed.append(json.loads(line)["index"])
                        valid_bytes += len(line)
            if valid_bytes:
                with part.open("r+b") as file:
                    file.truncate(valid_bytes)
            else:
                part.unlink(missing_ok=True)  # several ranks read and remove the same files
        return np.array(completed, np.int64)

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: list[Completion],
        batch: PromptBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        data = training_data(trainer)
        tokenizer, records = tokenizer_of(data), data.splits["predict"].records
        part = self._part(trainer.global_rank)
        lines = [] if part.is_file() else [self.header]
        for index, completion in zip(batch.indices, outputs, strict=True):
            prediction = {"index": index} | to_prediction(records[index], completion, tokenizer)
            lines.append(json.dumps(prediction, ensure_ascii=False) + "\n")
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as file:
            file.write("".join(lines).encode())

    def finish(self) -> None:
        """Sort the lines of all parts into the file, then remove the parts."""
        parts = self._parts()
        locations = array("q")  # index, part and offset of each line: the texts may not fit in memory
        for number, part in enumerate(parts):
            offset = len(self.header.encode())
            with part.open("rb") as file:
                file.seek(offset)
                for line in file:
                    locations.extend((json.loads(line)["index"], number, offset))
                    offset += len(line)
        atomic_write(self.file, self._sorted_lines(parts, np.array(locations, np.int64).reshape(-1, 3)))
        for part in parts:
            part.unlink(missing_ok=True)

    def _sorted_lines(self, parts: list[Path], locations: NDArray[np.int64]) -> Iterator[str]:
        """The lines in the order of their indices; an index that two ranks completed appears once."""
        files = [part.open("rb") for part in parts]
        try:
            for row in np.unique(locations[:, 0], return_index=True)[1].tolist():
                _, number, offset = locations[row].tolist()
                file = files[number]
                file.seek(offset)
                prediction = json.loads(file.readline())
                del prediction["index"]
                self.num_completions += 1
                self.num_at_limit += prediction["finish_reason"] == "length"
                yield json.dumps(prediction, ensure_ascii=False) + "\n"
        finally:
            for file in files:
                file.close()

    def _part(self, rank: int) -> Path:
        return self.file.with_name(f"{self.file.name}.part{rank or ''}")

    def _parts(self) -> list[Path]:
        return sorted(self.file.parent.glob(f"{glob.escape(self.file.name)}.part*"))


def to_prediction(record: Record, completion: Completion, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A line of predictions.jsonl; `reference` only where the record has a response."""
    return {
        "id": record.id,
        "instruction": record.instruction,
        "input": record.input,
        **({"reference": record.response} if record.response else {}),
        "completion": tokenizer.decode(completion.ids),
        "finish_reason": completion.finish_reason,
        "new_tokens": len(completion.ids),
    }
