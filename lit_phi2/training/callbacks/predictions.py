"""PredictionWriter: one object a record, in the order of the input.

    predictions.jsonl.<work>.part<rank>    {"index", "completion", "finish_reason", "new_tokens"}, in the order in which
                                           completions end; <work> is a hash of model, prompts and redaction
    predictions.jsonl                      {"id", "instruction", "input", "reference", "completion", "finish_reason",
                                           "new_tokens", "truncated"}; or .csv, .parquet (`output_files.py`)

A completion is in its .part file as soon as it ends, so a kill loses those that had not ended. Prompts are completed in
another order than they are given in; `finish` restores it. A predict that was killed continues from the .part files of
the same work. Those of other work belong to another predict and stay.
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

from lit_phi2.data.loaders import PROMPTS_PER_BATCH
from lit_phi2.data.splits import Split
from lit_phi2.errors import IncompleteError
from lit_phi2.training.completion_progress import CompletionProgress
from lit_phi2.training.output_files import write_predictions
from lit_phi2.training.outputs import CompletionSummary, redact_output, to_prediction
from lit_phi2.training.protocols import num_pending, training_data

log = logging.getLogger(__name__)


class PredictionWriter(Callback):
    """Appends completions to a .part file of each rank, and at the end sorts them into the file.

    Args:
        file: to write, replaced if it exists; its ending gives the format.
        fingerprint: everything that decides the completions: model and prompts.
        kinds: of identifiers that are written as placeholders, in both files.
        show_progress: whether rank 0 shows how many of its records are completed.

    Attributes:
        summary: of all completions in the file.
        seconds: that this predict generated for.
    """

    def __init__(
        self, file: Path, fingerprint: dict[str, Any], *, kinds: Collection[str] = (), show_progress: bool = True
    ) -> None:
        self.file = file
        self.kinds = kinds
        work = fingerprint | ({"redacted": sorted(kinds)} if kinds else {})
        self.work = hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()[:12]
        self.show_progress = show_progress
        self.summary = CompletionSummary()
        self.earlier_tokens = 0  # of completions that this predict found
        self.seconds = 0.0
        self._progress: CompletionProgress | None = None
        self._is_cut = True  # the .part file may end in half a line

    def read_completed(self) -> NDArray[np.int64]:
        """Indices that an earlier predict of the same work completed."""
        parts = self._parts(self.work)
        others = [part.name for part in self._parts() if part not in parts]
        if others:
            log.info("kept, of a predict with another model or other prompts that did not end: %s", ", ".join(others))
        completed = array("q")  # packed int64 here and below: there may be millions
        self.earlier_tokens = 0
        for part in parts:
            for output, _ in _iter_part(part):
                completed.append(output["index"])
                self.earlier_tokens += output["new_tokens"]
        return np.array(completed, np.int64)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_name(f"{self.file.name}.{self.work}.part{trainer.global_rank}")
        records = training_data(trainer).splits["predict"].records

        def write(output: dict[str, Any]) -> None:
            self.append(part, redact_output(records[output["index"]], output, self.kinds) if self.kinds else output)

        pl_module.on_completion = write
        total = int(min(num_pending(trainer), trainer.num_predict_batches[0] * PROMPTS_PER_BATCH))
        what = "completed" if trainer.world_size == 1 else f"completed by process 0 of {trainer.world_size}"
        shown = self.show_progress and trainer.is_global_zero
        self._progress = CompletionProgress(what, total, enabled=shown)

    def append(self, part: Path, output: dict[str, Any]) -> None:
        """Write a completion to a .part file."""
        line = json.dumps(output, ensure_ascii=False) + "\n"
        with part.open("ab") as file:
            file.write(("\n" * self._is_cut + line).encode())  # ends the last line of a predict that was killed
        self._is_cut = False
        if self._progress is not None:
            self._progress.add(output["new_tokens"])

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.on_completion = None
        if self._progress is not None:
            self._progress.close()
            self.seconds = self._progress.seconds

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.on_predict_end(trainer, pl_module)

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
            for output, offset in _iter_part(part):
                locations.extend((output["index"], number, offset))
        rows = np.array(locations, np.int64).reshape(-1, 3)
        rows = rows[np.unique(rows[:, 0], return_index=True)[1]]  # sorted; two ranks may have completed the same
        if not is_partial:
            self._check_complete(rows[:, 0], split)
        write_predictions(self.file, self._predictions(parts, rows, split))
        for part in parts:
            part.unlink(missing_ok=True)

    def log_summary(self) -> None:
        """Log what `finish` wrote."""
        generated = max(0, self.summary.num_tokens - self.earlier_tokens)
        log.info("%s: %s", self.summary.describe(self.seconds, num_tokens=generated), self.file)
        if warning := self.summary.repetition_warning():
            log.warning(warning)

    def _check_complete(self, indices: NDArray[np.int64], split: Split) -> None:
        total = len(split.examples)
        missing = np.setdiff1d(np.arange(total), indices)
        if len(missing):
            raise IncompleteError(
                f"{self.file}: not written, because {len(missing)} of {total} records have no completion, the first of "
                f"them {split.records[int(missing[0])].location}. Run predict again, which completes these alone; the "
                "processes of several machines need a folder that they share."
            )

    def _predictions(self, parts: list[Path], rows: NDArray[np.int64], split: Split) -> Iterator[dict[str, Any]]:
        files = [part.open("rb") for part in parts]
        try:
            for index, number, offset in rows.tolist():
                files[number].seek(offset)
                completion = json.loads(files[number].readline())
                self.summary.add(completion)
                yield to_prediction(split.records[index], split.examples[index], completion, self.kinds)
        finally:
            for file in files:
                file.close()

    def _parts(self, work: str = "[0-9a-f]{12}") -> list[Path]:
        """The .part files of some work, by default of any."""
        name = re.compile(rf"{re.escape(self.file.name)}\.{work}\.part\d+")
        paths = self.file.parent.glob(f"{glob.escape(self.file.name)}.*")
        return sorted(path for path in paths if name.fullmatch(path.name))


def _iter_part(part: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Each completion in a .part file, and its offset."""
    offset = 0
    with part.open("rb") as file:
        for line in file:
            with contextlib.suppress(ValueError):  # an empty line, or one that a kill cut short
                yield json.loads(line), offset
            offset += len(line)
