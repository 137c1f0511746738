"""Load a split: files -> records -> examples -> Split, in memory, or through the cache if the files are large.

    small files    records, canaries  ->  examples  ->  Split                           nothing on disk
    large files    records, canaries  ->  examples  ->  <cache_dir>/<hash>/  ->  Split  the first time
                                                        <cache_dir>/<hash>/  ->  Split  later

Nothing is raised for an invalid record: the split keeps it, so that the caller reports those of all splits at once.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lit_phi2.data.cache import cache_key, is_large, load_or_build_cache
from lit_phi2.data.canaries import Canary, read_planted
from lit_phi2.data.encode import iter_examples
from lit_phi2.data.invalid import InvalidRecord
from lit_phi2.data.records import ReadOptions, Record, iter_records, read_records
from lit_phi2.data.splits import EncodeResult, Split, build_split, hold_out, separate_invalid
from lit_phi2.errors import InputError
from lit_phi2.types import Example


def load_split(
    split_name: str,
    sources: list[str],
    options: ReadOptions,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    on_overlong: str,
    held_out: float | None,
    cache_dir: Path,
    canaries: Sequence[Canary] = (),
) -> Split:
    """Read and encode a split.

    Args:
        split_name: train, val, test or predict.
        sources: files, claims: and hub:, after folders and globs are expanded.
        options: how records are read.
        tokenizer: of the base.
        max_length: tokens in an example.
        on_overlong: data.on_overlong.
        held_out: the sources hold train and val, and this share of their records is val; None if they do not.
        cache_dir: contains the caches of large files.
        canaries: to plant after the records, unless none of these can be used.

    Raises:
        InputError: a source cannot be read, or a cache is damaged.
        OSError: the cache cannot be written.
    """
    with_response = split_name != "predict"
    record_options: dict[str, Any] = {"needs_response": with_response, "with_facts": split_name == "test"}
    limits: dict[str, Any] = {"max_length": max_length, "on_overlong": on_overlong}

    def encode(rows: Iterable[Record | InvalidRecord], invalid: list[InvalidRecord]) -> Iterator[EncodeResult]:
        return iter_examples(separate_invalid(rows, invalid), tokenizer, **limits, with_response=with_response)

    def source(invalid: list[InvalidRecord], forms: dict[str, str]) -> Iterator[EncodeResult]:
        rows = iter_records(sources, options, **record_options, forms=forms)
        if held_out is not None:
            rows = hold_out(rows, split_name, held_out)
        return _planted_after(encode(rows, invalid), encode(read_planted(canaries, options), invalid))

    skip = on_overlong == "skip"
    if not is_large(sources):
        return build_split(sources, source, skip=skip)
    part = None if held_out is None else (split_name, held_out)
    planted = {"canaries": [asdict(canary) for canary in canaries]} if canaries else {}
    key = cache_key(sources, tokenizer, reading=asdict(options), held_out=part, **record_options, **limits, **planted)
    return load_or_build_cache(sources, source, skip=skip, cache_dir=cache_dir, key=key)


def _planted_after(results: Iterator[EncodeResult], planted: Iterator[EncodeResult]) -> Iterator[EncodeResult]:
    """The results, then those of canaries if any record became an example."""
    has_examples = False
    for record, example in results:
        has_examples = has_examples or isinstance(example, Example)
        yield record, example
    if has_examples:
        yield from planted


def read_training_records(sources: list[str], options: ReadOptions) -> list[Record]:
    """The valid training records, as text.

    Raises:
        InputError: a source cannot be read, or none of its records is valid.
    """
    records, invalid = read_records(sources, options, needs_response=True)
    if not records:
        raise InputError(f"{', '.join(sources)}: none of the records can be used. The first: {invalid[0]}")
    return records
