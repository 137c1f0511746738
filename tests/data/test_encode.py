"""Encode: ids compared with a tokenizer that is called here on text written by hand."""

import json

import pytest
import tokenizers
from transformers import PreTrainedTokenizerBase

from lit_phi2.data.collate import collate
from lit_phi2.data.encode import Encoded, encode
from lit_phi2.data.records import Record
from lit_phi2.errors import InputError
from lit_phi2.pretrained import TINY_PHI_DIR
from lit_phi2.types import IGNORE_INDEX

Tokenizer = PreTrainedTokenizerBase

RECORD = Record(
    "r", "Why was claim 4417 denied?", "Code 97, $120.00\nPlan A", "It is included.\n\nAppeal.", "r.jsonl:1"
)
HEAD = "### Instruction:\nWhy was claim 4417 denied?\n\n### Input:\n"
TAIL = "\n\n### Response:\n"

# Reference: the tokenizers library reading the file itself, without transformers and its options.
ENGINE = tokenizers.Tokenizer.from_file(str(TINY_PHI_DIR / "tokenizer.json"))


def ids(text: str) -> list[int]:
    return ENGINE.encode(text, add_special_tokens=False).ids


def encode_one(record: Record, tokenizer: Tokenizer, **options: object) -> Encoded:
    return encode([record], tokenizer, **{"max_length": 512, **options})


def length_of(record: Record, tokenizer: Tokenizer) -> int:
    return len(encode_one(record, tokenizer).examples[0].ids)


def test_an_example_is_prompt_response_and_eos(tokenizer: Tokenizer) -> None:
    example = encode_one(RECORD, tokenizer).examples[0]
    prompt = ids(f"{HEAD}Code 97, $120.00\nPlan A{TAIL}")
    response = ids("It is included.\n\nAppeal.")
    assert example.ids == [*prompt, *response, tokenizer.eos_token_id]
    assert example.prompt_length == len(prompt)
    assert example.id == "r"
    assert not example.truncated


def test_only_response_and_eos_are_supervised(tokenizer: Tokenizer) -> None:
    """Checked on the labels that the loss receives."""
    labels = collate(encode_one(RECORD, tokenizer).examples, [(0,)]).labels[0].tolist()
    prompt = ids(f"{HEAD}Code 97, $120.00\nPlan A{TAIL}")
    response = ids("It is included.\n\nAppeal.")
    assert labels == [IGNORE_INDEX] * len(prompt) + response + [tokenizer.eos_token_id]


def test_prompt_and_response_are_encoded_separately(tokenizer: Tokenizer) -> None:
    """A response that begins with a blank line: encoded as one text, its newlines would merge with the prompt's."""
    record = Record("r", "Why?", "", "\n\nBecause.", "r.jsonl:1")
    prompt, response = "### Instruction:\nWhy?\n\n### Response:\n", "\n\nBecause."
    separate = ids(prompt) + ids(response)
    assert ids(prompt + response) != separate  # otherwise this test would prove nothing
    assert encode_one(record, tokenizer).examples[0].ids == [*separate, tokenizer.eos_token_id]


def test_the_predict_prompt_is_a_prefix_of_the_trained_ids(tokenizer: Tokenizer) -> None:
    trained = encode_one(RECORD, tokenizer).examples[0]
    prompt = encode_one(RECORD, tokenizer, with_response=False).examples[0]
    assert prompt.ids == trained.ids[: trained.prompt_length]
    assert prompt.prompt_length == len(prompt.ids)
    assert prompt.supervised_tokens == 0


@pytest.mark.parametrize("field", ["instruction", "input", "response"])
def test_eos_text_inside_a_record_is_not_the_eos_token(field: str, tokenizer: Tokenizer) -> None:
    """It stays ordinary text; otherwise the model could learn to stop in the middle of a quotation."""
    text = f"He wrote {tokenizer.eos_token} there."
    assert ids(text).count(tokenizer.eos_token_id) == 1  # otherwise this test would prove nothing
    texts = {"instruction": "Why?", "input": "", "response": "Because.", field: text}
    example = encode_one(Record("r", location="r.jsonl:1", **texts), tokenizer).examples[0]
    assert example.ids.index(tokenizer.eos_token_id) == len(example.ids) - 1
    assert text in tokenizer.decode(example.ids[:-1])


def test_an_example_decodes_to_its_record(tokenizer: Tokenizer) -> None:
    record = Record("r", "Größe ½?", "  two  spaces\tand a tab", "Oui — 予約 🙂", "r.jsonl:1")
    expected = "### Instruction:\nGröße ½?\n\n### Input:\n  two  spaces\tand a tab\n\n### Response:\nOui — 予約 🙂"
    assert tokenizer.decode(encode_one(record, tokenizer).examples[0].ids[:-1]) == expected


def test_records_stay_in_order_over_many_batches(tokenizer: Tokenizer) -> None:
    """With more records than are tokenized at once."""
    records = [Record(f"r{n}", f"Number {n}?", "", f"{n}.", f"r.jsonl:{n}") for n in range(2300)]
    encoded = encode(records, tokenizer, max_length=512)
    assert [example.id for example in encoded.examples] == [record.id for record in records]
    assert encoded.records == records
    last = [*ids("### Instruction:\nNumber 2299?\n\n### Response:\n"), *ids("2299.")]
    assert encoded.examples[-1].ids == [*last, tokenizer.eos_token_id]


# Overlong records


def test_an_example_has_at_most_max_length_tokens(tokenizer: Tokenizer) -> None:
    length = length_of(RECORD, tokenizer)
    assert not encode_one(RECORD, tokenizer, max_length=length, on_overlong="error").invalid
    assert len(encode_one(RECORD, tokenizer, max_length=length - 1, on_overlong="error").invalid) == 1


INPUTS = {
    "words": "claim denied appeal letter plan review records date service coverage notice send " * 5,
    "lines": "Line 1: $120.00\n\nLine 2: $45.50\n" * 8,
    "several bytes per character": "予約 Größe 🙂 ½ Straße 預金 " * 6,
    "spaces": "a        b\t\t\tc   \n   \n  d" * 6,
}


@pytest.mark.parametrize("kind", INPUTS)
def test_truncation_shortens_only_the_end_of_the_input(kind: str, tokenizer: Tokenizer) -> None:
    """At every limit from one token below the full length down to an empty input."""
    record = Record("r", "Why was claim 4417 denied?", INPUTS[kind], "It is included.", "r.jsonl:1")
    length = length_of(record, tokenizer)
    tail = [*ids("It is included."), tokenizer.eos_token_id]
    empty = len(ids(HEAD + TAIL)) + len(tail)
    assert length - empty > 40
    for max_length in range(length - 1, empty + 3, -1):
        encoded = encode_one(record, tokenizer, max_length=max_length)
        assert encoded.invalid == []
        example = encoded.examples[0]
        assert example.truncated
        assert len(example.ids) <= max_length
        assert example.ids[example.prompt_length :] == tail
        prompt = tokenizer.decode(example.ids[: example.prompt_length])
        assert prompt.startswith(HEAD)
        assert prompt.endswith(TAIL)
        kept_input = prompt[len(HEAD) : -len(TAIL)]
        assert record.input.startswith(kept_input)
        assert 0 < len(kept_input) < len(record.input)
        assert example.ids[: example.prompt_length] == ids(HEAD + kept_input + TAIL)


def test_truncation_removes_no_more_than_necessary(tokenizer: Tokenizer) -> None:
    """Reference: the input with one more word, encoded in full, does not fit."""
    words = INPUTS["words"].split()
    record = Record("r", "Why?", " ".join(words), "Because.", "r.jsonl:1")
    checked = 0
    for max_length in range(40, length_of(record, tokenizer)):
        example = encode_one(record, tokenizer, max_length=max_length).examples[0]
        prompt = tokenizer.decode(example.ids[: example.prompt_length])
        kept_input = prompt.removeprefix("### Instruction:\nWhy?\n\n### Input:\n").removesuffix(TAIL)
        complete = next(n for n in range(len(words), -1, -1) if kept_input.startswith(" ".join(words[:n])))
        longer = Record("r", "Why?", " ".join(words[: complete + 1]), "Because.", "r.jsonl:1")
        assert length_of(longer, tokenizer) > max_length
        checked += 1
    assert checked > 20


def test_predict_truncates_to_its_limit(tokenizer: Tokenizer) -> None:
    record = Record("r", "Why?", INPUTS["words"], "", "r.jsonl:1")
    example = encode_one(record, tokenizer, max_length=40, with_response=False).examples[0]
    assert example.truncated
    assert len(example.ids) <= 40
    assert tokenizer.decode(example.ids).endswith(TAIL)


LONG = {
    "response": Record("r", "Why?", "Code 97", "word " * 60, "r.jsonl:7"),
    "instruction": Record("r", "word " * 60, "Code 97", "Because.", "r.jsonl:7"),
    "no input": Record("r", "word " * 60, "", "Because.", "r.jsonl:7"),
}


@pytest.mark.parametrize("kind", LONG)
def test_a_record_that_truncation_cannot_fit_is_invalid(kind: str, tokenizer: Tokenizer) -> None:
    """Instruction, response and EOS are never shortened."""
    record = LONG[kind]
    encoded = encode_one(record, tokenizer, max_length=48)
    assert encoded.examples == encoded.records == encoded.skipped == []
    assert len(encoded.invalid) == 1
    message = str(encoded.invalid[0])
    assert message.startswith("r.jsonl:7: has ")
    assert "; the limit is 48, and truncating its input section is not enough." in message
    assert "Raise data.max_length, or shorten the record." in message


@pytest.mark.parametrize("input", ["Code 97", "\n" * 30 + "Code 97"])
def test_an_input_is_never_truncated_to_nothing(input: str, tokenizer: Tokenizer) -> None:
    """At limits that fit the record without its input section, or with a part of it."""
    record = Record("r", "Why?", input, "Because.", "r.jsonl:1")
    length = length_of(Record("r", "Why?", "", "Because.", "r.jsonl:1"), tokenizer)
    outcomes = set()
    for max_length in range(length, length_of(record, tokenizer)):
        encoded = encode_one(record, tokenizer, max_length=max_length)
        outcomes.add(len(encoded.invalid))
        for example in encoded.examples:
            assert "### Input:\n" in tokenizer.decode(example.ids)
    assert 1 in outcomes


def test_an_overlong_response_is_reported_with_its_length(tokenizer: Tokenizer) -> None:
    tokens = len(ids(LONG["response"].response)) + 1
    assert tokens > 48
    invalid = encode_one(LONG["response"], tokenizer, max_length=48).invalid[0]
    assert f"has a response of {tokens} tokens, EOS included; the limit is 48" in invalid.message


def test_predict_suggests_fewer_new_tokens_for_a_long_prompt(tokenizer: Tokenizer) -> None:
    invalid = encode_one(LONG["instruction"], tokenizer, max_length=48, with_response=False).invalid[0]
    assert "Lower model.max_new_tokens, or shorten the record." in invalid.message


def test_on_overlong_skip_skips_and_error_is_invalid(tokenizer: Tokenizer) -> None:
    short = Record("s", "Why?", "", "Because.", "r.jsonl:1")
    long = Record("l", "Why?", INPUTS["words"], "Because.", "r.jsonl:2")
    length = length_of(long, tokenizer)
    skip, error = (encode([long, short], tokenizer, max_length=40, on_overlong=o) for o in ("skip", "error"))
    assert [example.id for example in skip.examples] == [example.id for example in error.examples] == ["s"]
    assert skip.records == error.records == [short]
    assert skip.invalid == error.skipped == []
    message = f"r.jsonl:2: has {length} tokens; the limit is 40."
    for left_out in (skip.skipped, error.invalid):
        assert [str(record)[: len(message)] for record in left_out] == [message]


def test_an_overlong_record_is_kept_whole_for_rejected_jsonl(tokenizer: Tokenizer) -> None:
    """There the user can see and shorten it; the message itself contains no text of the record."""
    skipped = encode_one(RECORD, tokenizer, max_length=10, on_overlong="skip").skipped[0]
    assert json.loads(skipped.raw) == {
        "id": "r",
        "instruction": "Why was claim 4417 denied?",
        "input": "Code 97, $120.00\nPlan A",
        "response": "It is included.\n\nAppeal.",
    }
    assert "4417" not in str(skipped)


def test_an_unknown_on_overlong_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"data\.on_overlong: 'cut' is unknown; expected one of truncate, skip, error"):
        encode_one(RECORD, tokenizer, on_overlong="cut")
