"""Encode: Record -> Example; prompt and response are tokenized separately and joined.

    ids      p p p p p p r r r E        p prompt   r response   E EOS
    labels   . . . . . . r r r E        . IGNORE_INDEX

Separately, because joined text can merge the last token of the prompt with the first of the response; the prompt that
generation sees would then not be a prefix of the trained ids. A text such as "<|endoftext|>" inside a record is data:
it is split into ordinary tokens and never read as EOS.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from lit_phi2.data.identity import content_digest
from lit_phi2.data.invalid import InvalidRecord
from lit_phi2.data.prompts import format_prompt
from lit_phi2.data.records import Record
from lit_phi2.errors import InputError
from lit_phi2.types import Example
from lit_phi2.utils.sequences import batched

ON_OVERLONG = ("truncate", "skip", "error")
_BATCH_RECORDS = 1000  # records tokenized at once, enough to keep the tokenizer's threads busy


@dataclass(slots=True)
class Encoded:
    """The examples, and the records that became none.

    Attributes:
        examples: in the order of their records.
        records: the record of each example.
        invalid: overlong records, unless on_overlong is 'skip'.
        skipped: overlong records if on_overlong is 'skip'.
    """

    examples: list[Example] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    invalid: list[InvalidRecord] = field(default_factory=list)
    skipped: list[InvalidRecord] = field(default_factory=list)


def encode(
    records: Iterable[Record],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    on_overlong: str = "truncate",
    with_response: bool = True,
) -> Encoded:
    """Encode all records; the arguments are those of `iter_examples`."""
    encoded = Encoded()
    left_out = encoded.skipped if on_overlong == "skip" else encoded.invalid
    for record, example in iter_examples(
        records, tokenizer, max_length=max_length, on_overlong=on_overlong, with_response=with_response
    ):
        if isinstance(example, Example):
            encoded.examples.append(example)
            encoded.records.append(record)
        else:
            left_out.append(example)
    return encoded


def iter_examples(
    records: Iterable[Record],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    on_overlong: str = "truncate",
    with_response: bool = True,
    batch_records: int = _BATCH_RECORDS,
) -> Iterator[tuple[Record, Example | InvalidRecord]]:
    """Each record with its example, or with the reason why it does not fit.

    Args:
        records: valid records.
        tokenizer: of the base; its EOS token ends every response.
        max_length: tokens in an example, EOS included.
        on_overlong: 'truncate' shortens the input section at its end and nothing else; 'skip' and 'error' shorten
            nothing. The caller decides whether a record that does not fit is skipped or an error.
        with_response: False encodes the prompt alone, for predict.
        batch_records: records that are read before the first of them is encoded.

    Raises:
        InputError: an unknown on_overlong.
    """
    if on_overlong not in ON_OVERLONG:
        raise InputError(f"data.on_overlong: {on_overlong!r} is unknown; expected one of {', '.join(ON_OVERLONG)}.")
    # A text with more characters than this is too long whatever it contains, so megabytes are not tokenized.
    max_chars = (max_length + 1) * max(map(len, tokenizer.get_vocab()))
    for batch in batched(records, batch_records):
        clipped = [_clip_chars(record, max_chars) for record in batch]
        prompts = tokenize(tokenizer, [format_prompt(record.instruction, record.input) for record in clipped])
        responses = tokenize(tokenizer, [record.response for record in clipped]) if with_response else None
        for index, record in enumerate(batch):
            response = [*responses[index], tokenizer.eos_token_id] if responses is not None else []
            prompt, clip = prompts[index], clipped[index]
            if len(prompt) + len(response) <= max_length:
                yield record, Example(record.id, prompt + response, len(prompt), location=record.location)
            else:
                yield record, _fit(record, clip, prompt, response, tokenizer, max_length, on_overlong)


def token_budget(split_name: str, max_length: int, max_new_tokens: int, context: int, base: str) -> int:
    """Tokens that an example of a split may have; in predict, the context minus max_new_tokens.

    Args:
        split_name: train, val, test or predict.
        max_length: data.max_length.
        max_new_tokens: model.max_new_tokens.
        context: positions of the base.
        base: its name, for messages.

    Raises:
        InputError: max_length or max_new_tokens does not fit into the context.
    """
    if max_length > context:
        raise InputError(f"data.max_length: {max_length} is more than the {context} positions of base {base!r}.")
    if split_name != "predict":
        return max_length
    if max_new_tokens >= context:
        raise InputError(
            f"model.max_new_tokens: {max_new_tokens} leaves no tokens for a prompt; base {base!r} has {context} "
            "positions."
        )
    return context - max_new_tokens


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of texts, without added tokens and without reading any text as a special token."""
    engine: Any = tokenizer.backend_tokenizer  # every base has a tokenizer.json and therefore a fast tokenizer
    engine.encode_special_tokens = True
    engine.no_truncation()
    engine.no_padding()
    return [encoding.ids for encoding in engine.encode_batch_fast(texts, add_special_tokens=False)]


def _clip_chars(record: Record, max_chars: int) -> Record:
    """The record with each text cut to max_chars characters."""
    if max(len(record.instruction), len(record.input), len(record.response)) <= max_chars:
        return record
    texts = {name: getattr(record, name)[:max_chars] for name in ("instruction", "input", "response")}
    return replace(record, **texts)


def _fit(
    record: Record,
    clipped: Record,
    prompt: list[int],
    response: list[int],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    on_overlong: str,
) -> Example | InvalidRecord:
    """An example of an overlong record, truncated if on_overlong allows it."""
    if on_overlong == "truncate":
        truncated = _truncate_input(clipped, max_length - len(response), tokenizer)
        if truncated is not None:
            num_cut = len(prompt) - len(truncated)
            return Example(record.id, truncated + response, len(truncated), num_cut, location=record.location)
    raw = {name: getattr(record, name) for name in ("id", "instruction", "input", "response")}
    at_least = "" if clipped is record else "at least "
    message = _overlong_message(at_least, len(prompt), len(response), max_length, on_overlong)
    content = content_digest(record.instruction, record.input, record.response)
    text = json.dumps(raw, ensure_ascii=False)
    return InvalidRecord(record.location, message, text, record_id=record.id, content=content)


def _truncate_input(record: Record, token_budget: int, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The longest prompt within the budget that keeps a part of the input; None if no part of it fits."""
    text = record.input
    offsets = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )["offset_mapping"]
    num_kept = len(offsets)
    while num_kept > 0:
        prompt = tokenize(tokenizer, [format_prompt(record.instruction, text)])[0]
        excess = len(prompt) - token_budget
        if excess <= 0:
            return prompt
        # Cut the characters and tokenize again: cut ids could end inside a character of several bytes, and differ
        # from the tokens of the shorter text.
        num_kept -= excess
        text = record.input[: offsets[num_kept - 1][1]].rstrip() if num_kept > 0 else ""
        if not text:
            return None
    return None


def _overlong_message(
    at_least: str, prompt_tokens: int, response_tokens: int, max_length: int, on_overlong: str
) -> str:
    if response_tokens >= max_length:
        problem = f"has a response of {at_least}{response_tokens} tokens, EOS included"
    else:
        problem = f"has {at_least}{prompt_tokens + response_tokens} tokens"
    reason = ", and truncating its input section is not enough" if on_overlong == "truncate" else ""
    cure = "Raise data.max_length, or shorten the record"
    if response_tokens == 0:  # predict: the limit is the base's context minus max_new_tokens
        cure = "Lower model.max_new_tokens, or shorten the record"
    return f"{problem}; the limit is {max_length}{reason}. {cure}."
