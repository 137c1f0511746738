"""PredictionWriter: one object a record, in the order of the input.

    predictions.jsonl.<work>.part<rank>    {"index", "completion", "finish_reason", "new_tokens"}, in the order of
                                           generation; <work> is a hash of model and prompts
    predictions.jsonl                      {"id", "instruction", "input", "reference", "completion", "finish_reason",
                                           "new_tokens", "truncated"}

Prompts are completed shortest first, so that batches have little padding; `finish` restores the order. A predict that
was killed continues from the .part files of the same work. Those of other work belong to another predict and stay.
"""

import contextlib
import glob
import hashlib
import json
import logging
import re
from array import array
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray

from lit_phi2.audit.redaction import redact, redacted_id
from lit_phi2.data.records import Record
from lit_phi2.data.splits import Split
from lit_phi2.errors import IncompleteError
from lit_phi2.training.protocols import training_data
from lit_phi2.types import Example, PromptBatch
from lit_phi2.utils.files import atomic_write

log = logging.getLogger(__name__)


class PredictionWriter(Callback):
    """Appends completions to a .part file of each rank, and at the end sorts them into the file.

    Args:
        file: to write, replaced if it exists.
        fingerprint: everything that decides the completions: model and prompts.
        kinds: of identifiers that are written as placeholders.

    Attributes:
        num_completions: written to the file.
        num_at_limit: those that stopped at max_new_tokens.
    """

    def __init__(self, file: Path, fingerprint: dict[str, Any], kinds: Collection[str] = ()) -> None:
        self.file = file
        self.kinds = kinds
        work = fingerprint | ({"redacted": sorted(kinds)} if kinds else {})
        self.work = hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()[:12]
        self.num_completions = 0
        self.num_at_limit = 0

    def read_completed(self) -> NDArray[np.int64]:
        """Indices that an earlier predict of the same work completed."""
        parts = self._parts(self.work)
        others = [part.name for part in self._parts() if part not in parts]
        if others:
            log.info("kept, of a predict with another model or other prompts that did not end: %s", ", ".join(others))
        completed = array("q")  # packed int64 here and below: there may be millions
        for part in parts:
            completed.extend(index for index, _ in _iter_part(part))
        return np.array(completed, np.int64)

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: list[dict[str, Any]],
        batch: PromptBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        records = training_data(trainer).splits["predict"].records
        for output in outputs:
            texts = [*_texts(records[output["index"]]), output["completion"]]
            output["completion"] = redact(texts, self.kinds).texts[-1]
        lines = [json.dumps(output, ensure_ascii=False) + "\n" for output in outputs]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_name(f"{self.file.name}.{self.work}.part{trainer.global_rank}")
        with part.open("ab") as file:
            file.write(b"\n")  # ends the last line of a predict that was killed while it wrote
            file.write("".join(lines).encode())

    def finish(self, split: Split, *, is_partial: bool = False) -> None:
        """Sort the completions of all parts into the file, with their records, and remove the parts.

        Args:
            split: the records in the order of the input, and their examples.
            is_partial: only some of the records were to be completed.

        Raises:
            IncompleteError: a record has no completion; the file and the parts stay as they are.
        """
        parts = self._parts(self.work)
        locations = array("q")  # index, part and offset of each completion: the texts may not fit in memory
        for number, part in enumerate(parts):
            for index, offset in _iter_part(part):
                locations.extend((index, number, offset))
        rows = np.array(locations, np.int64).reshape(-1, 3)
        rows = rows[np.unique(rows[:, 0], return_index=True)[1]]  # sorted; two ranks may have completed the same
        if not is_partial:
            self._check_complete(rows[:, 0], split)
        atomic_write(self.file, self._lines(parts, rows, split))
        for part in parts:
            part.unlink(missing_ok=True)

    def _check_complete(self, indices: NDArray[np.int64], split: Split) -> None:
        total = len(split.examples)
        missing = np.setdiff1d(np.arange(total), indices)
        if len(missing):
            raise IncompleteError(
                f"{self.file}: not written, because {len(missing)} of {total} records have no completion, the first of "
                f"them {split.records[int(missing[0])].location}. Run predict again, which completes these alone; the "
                "processes of several machines need a folder that they share."
            )

    def _lines(self, parts: list[Path], rows: NDArray[np.int64], split: Split) -> Iterator[str]:
        files = [part.open("rb") for part in parts]
        try:
            for index, number, offset in rows.tolist():
                files[number].seek(offset)
                completion = json.loads(files[number].readline())
                self.num_completions += 1
                self.num_at_limit += completion["finish_reason"] == "length"
                prediction = to_prediction(split.records[index], split.examples[index], completion, self.kinds)
                yield json.dumps(prediction, ensure_ascii=False) + "\n"
        finally:
            for file in files:
                file.close()

    def _parts(self, work: str = "[0-9a-f]{12}") -> list[Path]:
        """The .part files of some work, by default of any."""
        name = re.compile(rf"{re.escape(self.file.name)}\.{work}\.part\d+")
        paths = self.file.parent.glob(f"{glob.escape(self.file.name)}.*")
        return sorted(path for path in paths if name.fullmatch(path.name))


def _iter_part(part: Path) -> Iterator[tuple[int, int]]:
    """Index and offset of each completion in a .part file."""
    offset = 0
    with part.open("rb") as file:
        for line in file:
            with contextlib.suppress(ValueError):  # an empty line, or one that a kill cut short
                yield json.loads(line)["index"], offset
            offset += len(line)


def to_prediction(
    record: Record, example: Example, completion: dict[str, Any], kinds: Collection[str] = ()
) -> dict[str, Any]:
    """A line of predictions.jsonl.

    Args:
        record: `reference` is written only if it has a response.
        example: `truncated` is written only if the prompt was shortened.
        completion: a line of a .part file.
        kinds: of identifiers that are written as placeholders.
    """
    instruction, input, reference = redact(_texts(record), kinds).texts
    return {
        "id": redacted_id(record.id, record.location, kinds),
        "instruction": instruction,
        "input": input,
        **({"reference": reference} if reference else {}),
        **{name: completion[name] for name in ("completion", "finish_reason", "new_tokens")},
        **({"truncated": True} if example.truncated else {}),
    }


def _texts(record: Record) -> list[str]:
    return [record.instruction, record.input, record.response]
