"""Encoding: ids against the tokenizer called by hand on texts written by hand."""

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


# Reference: the engine of the tokenizers library, read from the file by itself, without transformers and its options.
ENGINE = tokenizers.Tokenizer.from_file(str(TINY_PHI_DIR / "tokenizer.json"))


def ids(text: str) -> list[int]:
    return ENGINE.encode(text, add_special_tokens=False).ids


def one(record: Record, tokenizer: Tokenizer, **options: object) -> Encoded:
    return encode([record], tokenizer, **{"max_length": 512, **options})


def length_of(record: Record, tokenizer: Tokenizer) -> int:
    return len(one(record, tokenizer).examples[0].ids)


def test_an_example_is_prompt_response_and_end_token(tokenizer: Tokenizer) -> None:
    example = one(RECORD, tokenizer).examples[0]
    prompt = ids(f"{HEAD}Code 97, $120.00\nPlan A{TAIL}")
    response = ids("It is included.\n\nAppeal.")
    assert example.ids == [*prompt, *response, tokenizer.eos_token_id]
    assert example.prompt_length == len(prompt)
    assert example.id == "r"
    assert not example.truncated


def test_response_and_end_token_are_supervised_and_the_prompt_is_not(tokenizer: Tokenizer) -> None:
    """Through to the labels that the loss sees."""
    labels = collate(one(RECORD, tokenizer).examples, [(0,)]).labels[0].tolist()
    prompt = ids(f"{HEAD}Code 97, $120.00\nPlan A{TAIL}")
    response = ids("It is included.\n\nAppeal.")
    assert labels == [IGNORE_INDEX] * len(prompt) + response + [tokenizer.eos_token_id]


def test_prompt_and_response_are_encoded_apart(tokenizer: Tokenizer) -> None:
    """A response that begins with a blank line: encoded as one text, its newlines would merge with the prompt's."""
    record = Record("r", "Why?", "", "\n\nBecause.", "r.jsonl:1")
    prompt, response = "### Instruction:\nWhy?\n\n### Response:\n", "\n\nBecause."
    apart = ids(prompt) + ids(response)
    assert ids(prompt + response) != apart  # or this test would show nothing
    assert one(record, tokenizer).examples[0].ids == [*apart, tokenizer.eos_token_id]


def test_the_prompt_of_predict_is_an_exact_prefix_of_what_was_trained(tokenizer: Tokenizer) -> None:
    trained = one(RECORD, tokenizer).examples[0]
    asked = one(RECORD, tokenizer, with_response=False).examples[0]
    assert asked.ids == trained.ids[: trained.prompt_length]
    assert asked.prompt_length == len(asked.ids)
    assert asked.supervised_tokens == 0


@pytest.mark.parametrize("field", ["instruction", "input", "response"])
def test_the_end_tokens_text_within_a_record_is_not_the_end_token(field: str, tokenizer: Tokenizer) -> None:
    """It stays readable text, or an answer could be taught to stop in the middle of a quotation."""
    text = f"He wrote {tokenizer.eos_token} there."
    assert ids(text).count(tokenizer.eos_token_id) == 1  # or this test would show nothing
    texts = {"instruction": "Why?", "input": "", "response": "Because.", field: text}
    example = one(Record("r", place="r.jsonl:1", **texts), tokenizer).examples[0]
    assert example.ids.index(tokenizer.eos_token_id) == len(example.ids) - 1
    assert text in tokenizer.decode(example.ids[:-1])


def test_what_was_encoded_decodes_to_the_record(tokenizer: Tokenizer) -> None:
    record = Record("r", "Größe ½?", "  two  spaces\tand a tab", "Oui — 予約 🙂", "r.jsonl:1")
    expected = "### Instruction:\nGröße ½?\n\n### Input:\n  two  spaces\tand a tab\n\n### Response:\nOui — 予約 🙂"
    assert tokenizer.decode(one(record, tokenizer).examples[0].ids[:-1]) == expected


def test_records_come_out_in_order_over_many_batches(tokenizer: Tokenizer) -> None:
    """More records than are tokenized at once."""
    records = [Record(f"r{n}", f"Number {n}?", "", f"{n}.", f"r.jsonl:{n}") for n in range(2300)]
    encoded = encode(records, tokenizer, max_length=512)
    assert [example.id for example in encoded.examples] == [record.id for record in records]
    assert encoded.records == records
    last = [*ids("### Instruction:\nNumber 2299?\n\n### Response:\n"), *ids("2299.")]
    assert encoded.examples[-1].ids == [*last, tokenizer.eos_token_id]


# Too long


def test_an_example_may_fill_max_length_and_no_more(tokenizer: Tokenizer) -> None:
    length = length_of(RECORD, tokenizer)
    assert not one(RECORD, tokenizer, max_length=length, on_overlong="error").faults
    assert len(one(RECORD, tokenizer, max_length=length - 1, on_overlong="error").faults) == 1


INPUTS = {
    "words": "claim denied appeal letter plan review records date service coverage notice send " * 5,
    "lines": "Line 1: $120.00\n\nLine 2: $45.50\n" * 8,
    "many bytes a character": "予約 Größe 🙂 ½ Straße 預金 " * 6,
    "spaces": "a        b\t\t\tc   \n   \n  d" * 6,
}


@pytest.mark.parametrize("kind", INPUTS)
def test_trimming_shortens_only_the_input_and_only_at_its_end(kind: str, tokenizer: Tokenizer) -> None:
    """At every limit from one token less than the whole down to where nothing of the input is left."""
    record = Record("r", "Why was claim 4417 denied?", INPUTS[kind], "It is included.", "r.jsonl:1")
    length = length_of(record, tokenizer)
    tail = [*ids("It is included."), tokenizer.eos_token_id]
    empty = len(ids(HEAD + TAIL)) + len(tail)
    assert length - empty > 40
    for max_length in range(length - 1, empty + 3, -1):
        encoded = one(record, tokenizer, max_length=max_length)
        assert encoded.faults == []
        example = encoded.examples[0]
        assert example.truncated
        assert len(example.ids) <= max_length
        assert example.ids[example.prompt_length :] == tail
        prompt = tokenizer.decode(example.ids[: example.prompt_length])
        assert prompt.startswith(HEAD)
        assert prompt.endswith(TAIL)
        cut = prompt[len(HEAD) : -len(TAIL)]
        assert record.input.startswith(cut)
        assert 0 < len(cut) < len(record.input)
        assert example.ids[: example.prompt_length] == ids(HEAD + cut + TAIL)


def test_trimming_takes_no_more_than_it_must(tokenizer: Tokenizer) -> None:
    """Reference: one word more, encoded whole, no longer fits."""
    words = INPUTS["words"].split()
    record = Record("r", "Why?", " ".join(words), "Because.", "r.jsonl:1")
    checked = 0
    for max_length in range(40, length_of(record, tokenizer)):
        example = one(record, tokenizer, max_length=max_length).examples[0]
        prompt = tokenizer.decode(example.ids[: example.prompt_length])
        cut = prompt.removeprefix("### Instruction:\nWhy?\n\n### Input:\n").removesuffix(TAIL)
        complete = next(n for n in range(len(words), -1, -1) if cut.startswith(" ".join(words[:n])))
        longer = Record("r", "Why?", " ".join(words[: complete + 1]), "Because.", "r.jsonl:1")
        assert length_of(longer, tokenizer) > max_length
        checked += 1
    assert checked > 20


def test_predict_trims_to_its_limit_too(tokenizer: Tokenizer) -> None:
    record = Record("r", "Why?", INPUTS["words"], "", "r.jsonl:1")
    example = one(record, tokenizer, max_length=40, with_response=False).examples[0]
    assert example.truncated
    assert len(example.ids) <= 40
    assert tokenizer.decode(example.ids).endswith(TAIL)


LONG = {
    "response": Record("r", "Why?", "Code 97", "word " * 60, "r.jsonl:7"),
    "instruction": Record("r", "word " * 60, "Code 97", "Because.", "r.jsonl:7"),
    "no input": Record("r", "word " * 60, "", "Because.", "r.jsonl:7"),
}


@pytest.mark.parametrize("kind", LONG)
def test_a_record_that_trimming_cannot_save_is_a_fault(kind: str, tokenizer: Tokenizer) -> None:
    """Neither instruction, response nor end token is ever cut."""
    record = LONG[kind]
    encoded = one(record, tokenizer, max_length=48)
    assert encoded.examples == encoded.records == encoded.skipped == []
    assert len(encoded.faults) == 1
    message = str(encoded.faults[0])
    assert message.startswith("r.jsonl:7: record 'r' ")
    assert "but 48 are allowed, and shortening its input section cannot make it fit." in message
    assert "Raise data.max_length, or shorten the record." in message


@pytest.mark.parametrize("input", ["Code 97", "\n" * 30 + "Code 97"])
def test_an_input_is_not_trimmed_to_nothing(input: str, tokenizer: Tokenizer) -> None:
    """From the limit that would just hold the record without its input section: a question about nothing."""
    record = Record("r", "Why?", input, "Because.", "r.jsonl:1")
    length = length_of(Record("r", "Why?", "", "Because.", "r.jsonl:1"), tokenizer)
    outcomes = set()
    for max_length in range(length, length_of(record, tokenizer)):
        encoded = one(record, tokenizer, max_length=max_length)
        outcomes.add(len(encoded.faults))
        for example in encoded.examples:
            assert "### Input:\n" in tokenizer.decode(example.ids)
    assert 1 in outcomes


def test_a_response_longer_than_allowed_is_told_with_its_length(tokenizer: Tokenizer) -> None:
    tokens = len(ids(LONG["response"].response)) + 1
    assert tokens > 48
    fault = one(LONG["response"], tokenizer, max_length=48).faults[0]
    assert f"has a response of {tokens} tokens, end token included, but 48 are allowed" in fault.message


def test_in_predict_the_cure_for_a_long_prompt_is_fewer_new_tokens(tokenizer: Tokenizer) -> None:
    fault = one(LONG["instruction"], tokenizer, max_length=48, with_response=False).faults[0]
    assert "Lower model.max_new_tokens, or shorten the record." in fault.message


def test_overlong_skip_leaves_out_and_error_is_a_fault(tokenizer: Tokenizer) -> None:
    shorten = Record("s", "Why?", "", "Because.", "r.jsonl:1")
    long = Record("l", "Why?", INPUTS["words"], "Because.", "r.jsonl:2")
    length = length_of(long, tokenizer)
    skip, error = (encode([long, shorten], tokenizer, max_length=40, on_overlong=o) for o in ("skip", "error"))
    assert [example.id for example in skip.examples] == [example.id for example in error.examples] == ["s"]
    assert skip.records == error.records == [shorten]
    assert skip.faults == error.skipped == []
    message = f"r.jsonl:2: record 'l' takes {length} tokens but 40 are allowed."
    for left_out in (skip.skipped, error.faults):
        assert [str(fault)[: len(message)] for fault in left_out] == [message]


def test_an_overlong_record_is_kept_whole_for_rejected_jsonl(tokenizer: Tokenizer) -> None:
    """So that it can be shortened and read again."""
    fault = one(RECORD, tokenizer, max_length=10, on_overlong="skip").skipped[0]
    assert json.loads(fault.raw) == {
        "id": "r",
        "instruction": "Why was claim 4417 denied?",
        "input": "Code 97, $120.00\nPlan A",
        "response": "It is included.\n\nAppeal.",
    }
    assert "4417" not in str(fault)


def test_an_unknown_overlong_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"data\.on_overlong: 'cut' is unknown; expected one of truncate, skip, error"):
        one(RECORD, tokenizer, on_overlong="cut")
