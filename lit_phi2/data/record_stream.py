"""Record stream: sources -> records with their prompts, each as soon as it is read, for sources that never end.

    {"instruction": "Why ..."}    ->  (Record, Example)
    {"instruction": 7}            ->  InvalidRecord

A split is read as a whole before its first record is used (`load_split.py`); here nothing waits for what follows it.
"""

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from lit_phi2.data.encode import iter_examples
from lit_phi2.data.invalid import InvalidRecord
from lit_phi2.data.records import ReadOptions, Record, iter_records
from lit_phi2.types import Example

StreamItem = tuple[Record, Example] | InvalidRecord


def stream_examples(
    sources: Sequence[str],
    options: ReadOptions,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    on_overlong: str,
) -> Iterator[StreamItem]:
    """Records with the examples of their prompts, in order; those that cannot be used stand in their places.

    Args:
        sources: files, claims:, hub: or standard input, after folders and globs are expanded.
        options: how records are read.
        tokenizer: of the base.
        max_length: tokens in a prompt.
        on_overlong: data.on_overlong.

    Raises:
        InputError: a source cannot be read.
    """
    read: list[Record] = []
    examples = iter_examples(
        iter(read.pop, None),
        tokenizer,
        max_length=max_length,
        on_overlong=on_overlong,
        with_response=False,
        batch_records=1,
    )
    for record in iter_records(sources, options, needs_response=False):
        if isinstance(record, InvalidRecord):
            yield record
            continue
        read.append(record)
        _, example = next(examples)
        yield example if isinstance(example, InvalidRecord) else (record, example)
