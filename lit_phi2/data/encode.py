"""Encode: a Record becomes an Example, its prompt and its response tokenized apart and joined.

    ids      p p p p p p r r r E        p prompt   r response   E end token
    labels   . . . . . . r r r E        . IGNORE_INDEX

Apart, because joined text can merge the last token of the prompt with the first of the response; then what
generation sees would not be a prefix of what was trained on. A text like "<|endoftext|>" inside a record is data: it is
split into ordinary tokens and never read as the end token.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from lit_phi2.data.prompts import format_prompt
from lit_phi2.data.records import InvalidRecord, Record
from lit_phi2.data.text import shorten
from lit_phi2.errors import InputError
from lit_phi2.types import Example
from lit_phi2.utils.sequences import batched

ON_OVERLONG = ("truncate", "skip", "error")
_BATCH = 1000  # records tokenized at a time, enough to keep the tokenizer's threads busy


@dataclass(slots=True)
class Encoded:
    """What became of the records.

    Attributes:
        examples: in the order of their records.
        records: the record of each example.
        faults: records that cannot be made to fit; bad records.
        skipped: records left out because overlong is 'skip'.
    """

    examples: list[Example] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    faults: list[InvalidRecord] = field(default_factory=list)
    skipped: list[InvalidRecord] = field(default_factory=list)


def encode(
    records: Iterable[Record],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    on_overlong: str = "truncate",
    with_response: bool = True,
) -> Encoded:
    """Tokenize records and settle the ones that are too long; see `each_example`."""
    encoded = Encoded()
    left_out = encoded.skipped if on_overlong == "skip" else encoded.faults
    for record, settled in iter_examples(
        records, tokenizer, max_length=max_length, on_overlong=on_overlong, with_response=with_response
    ):
        if isinstance(settled, Example):
            encoded.examples.append(settled)
            encoded.records.append(record)
        else:
            left_out.append(settled)
    return encoded


def iter_examples(
    records: Iterable[Record],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    on_overlong: str = "truncate",
    with_response: bool = True,
) -> Iterator[tuple[Record, Example | InvalidRecord]]:
    """Each record as tokens, or why it cannot be used.

    Args:
        records: checked records.
        tokenizer: of the base; its end token closes every response.
        max_length: tokens that an example may hold, end token included.
        on_overlong: 'truncate' shortens the input section at its end and nothing else; 'skip' leaves the record out; 'error'
            makes it a bad record. One that trimming cannot save is a bad record too.
        with_response: False encodes the prompt alone, for predict.

    Raises:
        InputError: an unknown overlong.
    """
    if on_overlong not in ON_OVERLONG:
        raise InputError(f"data.on_overlong: {on_overlong!r} is unknown; expected one of {', '.join(ON_OVERLONG)}.")
    # No token covers more characters, so a text of more is too long, however it goes on; megabytes are not tokenized.
    most_characters = (max_length + 1) * max(map(len, tokenizer.get_vocab()))
    for batch in batched(records, _BATCH):
        begun = [_clip_chars(record, most_characters) for record in batch]
        prompts = tokenize(tokenizer, [format_prompt(record.instruction, record.input) for record in begun])
        responses = [[] for _ in batch] if not with_response else _responses(tokenizer, begun)
        for record, beginning, prompt, response in zip(batch, begun, prompts, responses, strict=True):
            yield record, _build_example(record, beginning, prompt, response, tokenizer, max_length, on_overlong)


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of texts, with nothing added and no text taken for a special token."""
    engine: Any = tokenizer.backend_tokenizer  # every base has a tokenizer.json, hence one
    engine.encode_special_tokens = True
    engine.no_truncation()
    engine.no_padding()
    return [encoding.ids for encoding in engine.encode_batch_fast(texts, add_special_tokens=False)]


def _responses(tokenizer: PreTrainedTokenizerBase, batch: Sequence[Record]) -> list[list[int]]:
    return [[*ids, tokenizer.eos_token_id] for ids in tokenize(tokenizer, [record.response for record in batch])]


def _clip_chars(record: Record, characters: int) -> Record:
    """The record, each text cut to so many characters."""
    if max(len(record.instruction), len(record.input), len(record.response)) <= characters:
        return record
    texts = {name: getattr(record, name)[:characters] for name in ("instruction", "input", "response")}
    return replace(record, **texts)


def _build_example(
    record: Record,
    beginning: Record,
    prompt: list[int],
    response: list[int],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    on_overlong: str,
) -> Example | InvalidRecord:
    num_tokens = len(prompt) + len(response)
    if num_tokens <= max_length:
        return Example(record.id, prompt + response, len(prompt))
    truncated = _truncate_input(beginning, max_length - len(response), tokenizer) if on_overlong == "truncate" else None
    if truncated is not None:
        return Example(record.id, truncated + response, len(truncated), truncated=True)
    raw = {name: getattr(record, name) for name in ("id", "instruction", "input", "response")}
    at_least = "" if beginning is record else "at least "
    message = _too_long(record, at_least, num_tokens, len(response), max_length, on_overlong)
    return InvalidRecord(record.location, message, json.dumps(raw, ensure_ascii=False))


def _truncate_input(record: Record, token_budget: int, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The prompt with as much of the start of the input as `room` tokens allow; None if not even a word of it fits."""
    text = record.input
    offsets = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )["offset_mapping"]
    keep = len(offsets)
    while keep > 0:
        prompt = tokenize(tokenizer, [format_prompt(record.instruction, text)])[0]
        excess = len(prompt) - token_budget
        if excess <= 0:
            return prompt
        # Cut by characters and tokenize anew: cut ids could end inside a character of several bytes, and would
        # not be what the tokenizer makes of the shorter text.
        keep -= excess
        text = record.input[: offsets[keep - 1][1]].rstrip() if keep > 0 else ""
        if not text:
            return None
    return None


def _too_long(
    record: Record, at_least: str, num_tokens: int, response_tokens: int, max_length: int, on_overlong: str
) -> str:
    if response_tokens >= max_length:
        found = (
            f"record {shorten(record.id)!r} has a response of {at_least}{response_tokens} tokens, end token included,"
        )
    else:
        found = f"record {shorten(record.id)!r} takes {at_least}{num_tokens} tokens"
    why = ", and shortening its input section cannot make it fit" if on_overlong == "truncate" else ""
    cure = "Raise data.max_length, or shorten the record"
    if response_tokens == 0:  # predict, where the limit is the base's context less the room for an answer
        cure = "Lower model.max_new_tokens, or shorten the record"
    return f"{found} but {max_length} are allowed{why}. {cure}."
