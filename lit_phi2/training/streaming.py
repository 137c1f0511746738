"""Streaming: answers on standard output while they are generated; nothing is written to disk.

    --instruction "Why ..."    one completion, token by token; as a whole where identifiers become placeholders
    --output -                 one JSON object a record, in the order of the input, each as soon as all before it ended
    --data.predict_files -     records from standard input, answered while more are read (with --output -)

Everything else, progress and figures, is on standard error.
"""

import logging
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from lit_phi2.audit.redaction import redact
from lit_phi2.data.invalid import MAX_SHOWN, InvalidRecord, raise_invalid
from lit_phi2.data.record_stream import StreamItem
from lit_phi2.data.records import Record
from lit_phi2.generation.engine import Engine
from lit_phi2.generation.feed import AHEAD, feed
from lit_phi2.generation.repetition import ends_in_cycle
from lit_phi2.generation.streaming import stream_completion
from lit_phi2.training.completion_progress import CompletionProgress
from lit_phi2.training.output_files import to_line
from lit_phi2.training.outputs import CompletionSummary, redact_output, to_output, to_prediction
from lit_phi2.types import Example
from lit_phi2.utils.arrivals import arrivals
from lit_phi2.utils.console import write_text

log = logging.getLogger(__name__)


def print_completion(
    engine: Engine,
    prompt: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    *,
    question: Sequence[str] = (),
    kinds: Collection[str] = (),
) -> None:
    """Write a completion to standard output as it grows, and its figures to standard error.

    Args:
        engine: without other prompts.
        prompt: token ids.
        tokenizer: of the base.
        question: the texts of the prompt, whose identifiers have the same placeholders in the completion.
        kinds: of identifiers that are written as placeholders.
    """
    pieces: list[str] = []
    # Where an identifier ends, and whether it is one, is known only from what follows it.
    streamed = stream_completion(engine, prompt, tokenizer, pieces.append if kinds else write_text)
    write_text(redact([*question, "".join(pieces)], kinds).texts[-1] + "\n")
    log.info("%s", streamed.describe())
    if streamed.completion.finish_reason == "length" and ends_in_cycle(streamed.completion.ids):
        log.warning("It repeats itself up to model.max_new_tokens: train longer, or on more records.")


def print_predictions(
    engine: Engine,
    source: Iterable[StreamItem],
    tokenizer: PreTrainedTokenizerBase,
    *,
    total: int | None,
    skip_invalid: bool,
    kinds: Collection[str] = (),
    show_progress: bool,
) -> None:
    """Write a line of JSON for every record to standard output.

    Args:
        engine: without other prompts.
        source: records in order; may be slow or endless.
        tokenizer: of the base.
        total: records of the source; None if that is not known.
        skip_invalid: leave invalid records out; otherwise the first ends the stream, after the answers to those before.
        kinds: of identifiers that are written as placeholders.
        show_progress: on standard error; never where standard output is the same terminal.

    Raises:
        InputError: a record is invalid.
        BrokenPipeError: nobody reads standard output any more.
    """
    stream = _RecordStream(engine, source, tokenizer, skip_invalid=skip_invalid, kinds=kinds)
    progress = CompletionProgress("completed", total, enabled=show_progress and not sys.stdout.isatty())
    summary = CompletionSummary()
    try:
        for prediction, output in stream.predictions():
            _write_line(to_line(prediction))
            summary.add(output)
            progress.add(output["new_tokens"])
    finally:
        progress.close()
    log.info("%s", summary.describe(progress.seconds))
    if warning := summary.repetition_warning():
        log.warning(warning)
    stream.report_invalid()


class _RecordStream:
    """Records in, predictions in the same order out."""

    def __init__(
        self,
        engine: Engine,
        source: Iterable[StreamItem],
        tokenizer: PreTrainedTokenizerBase,
        *,
        skip_invalid: bool,
        kinds: Collection[str],
    ) -> None:
        self.engine = engine
        self.source = source
        self.tokenizer = tokenizer
        self.skip_invalid = skip_invalid
        self.kinds = kinds
        self.pending: dict[int, tuple[Record, Example]] = {}  # by number, in order; until their predictions are out
        self.num_invalid = 0
        self.fatal: InvalidRecord | None = None

    def predictions(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Predictions with the outputs that they are made of."""
        ended: dict[int, dict[str, Any]] = {}
        following = 0
        for number, completion in feed(self.engine, self._prompts()):
            ended[number] = to_output(number, completion, self.tokenizer)
            while following in ended:
                record, example = self.pending.pop(following)
                output = redact_output(record, ended.pop(following), self.kinds)
                yield to_prediction(record, example, output, self.kinds), output
                following += 1

    def report_invalid(self) -> None:
        """Raise for the record that ended the stream, or tell how many were left out."""
        if self.fatal is not None:
            raise_invalid([self.fatal], setting="data.predict_files")
        if self.num_invalid > MAX_SHOWN:
            log.warning("records left out: %d", self.num_invalid)

    def _prompts(self) -> Iterator[tuple[int, list[int]] | None]:
        number = 0
        for item in arrivals(self.source, lambda: not self.engine.waiting + self.engine.active, ahead=AHEAD):
            if item is None:
                yield None
            elif isinstance(item, InvalidRecord):
                self.num_invalid += 1
                if not self.skip_invalid:
                    self.fatal = item
                    return
                if self.num_invalid <= MAX_SHOWN:
                    log.warning("left out: %s", item)
            else:
                self.pending[number] = item
                yield number, item[1].ids[: item[1].prompt_length]
                number += 1


def _write_line(line: str) -> None:
    if sys.stdout.isatty():
        write_text(line)
        return
    sys.stdout.buffer.write(line.encode())  # JSON is UTF-8, whatever the locale
    sys.stdout.buffer.flush()
