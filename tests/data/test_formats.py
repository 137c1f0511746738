"""Forms: the records that people have, read by the fields that they have. References are written by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from lit_phi2.data.invalid import describe_invalid
from lit_phi2.data.records import FieldNames, ReadOptions, Record, iter_records
from lit_phi2.errors import InputError

Texts = tuple[str, str, str]

SYSTEM = {"role": "system", "content": "You answer briefly."}
USER, USER_2 = ({"role": "user", "content": text} for text in ("Why was claim 12 denied?", "What now?"))
ASSISTANT, ASSISTANT_2 = ({"role": "assistant", "content": text} for text in ("A referral was missing.", "Send it."))
WHY, BECAUSE = USER["content"], ASSISTANT["content"]


def read(path: Path, turns: str = "error", needs_response: bool = True, **fields: str) -> list[Texts | str]:
    """Each record's texts, or why it is invalid, without its path."""
    options = ReadOptions(FieldNames(**fields), turns)
    return [
        (record.instruction, record.input, record.response)
        if isinstance(record, Record)
        else str(record).removeprefix(f"{path}:")
        for record in iter_records([str(path)], options, needs_response=needs_response)
    ]


@pytest.fixture
def read_one(write_jsonl: Callable[..., Path]) -> Callable[..., Texts | str]:
    def read_row(row: dict[str, Any], **options: Any) -> Texts | str:
        return read(write_jsonl([row]), **options)[0]

    return read_row


ReadOne = Callable[..., Texts | str]

# Forms

FORMS: dict[str, tuple[dict[str, Any], Texts]] = {
    "Alpaca": ({"instruction": "Why?", "input": "Code 97", "output": "So."}, ("Why?", "Code 97", "So.")),
    "Dolly": (
        {"instruction": "Why?", "context": "Code 97", "response": "So.", "category": "closed_qa"},
        ("Why?", "Code 97", "So."),
    ),
    "Alpaca with its text column": (
        {"instruction": "Why?", "input": "", "output": "So.", "text": "### Instruction:\nWhy?\n### Response:\nSo."},
        ("Why?", "", "So."),
    ),
    "an empty input beside a context": (
        {"instruction": "Why?", "input": " ", "context": "Code 97", "response": "So.", "output": None},
        ("Why?", "Code 97", "So."),
    ),
    "prompt and completion": ({"prompt": "Why?", "completion": " So."}, ("Why?", "", " So.")),
    "prompt and completion as messages": ({"prompt": [USER], "completion": [ASSISTANT]}, (WHY, "", BECAUSE)),
    "prompt with system text": (
        {"prompt": [SYSTEM, USER], "completion": "So."},
        (f"You answer briefly.\n\n{WHY}", "", "So."),
    ),
    "OpenAI": ({"messages": [USER, ASSISTANT]}, (WHY, "", BECAUSE)),
    "OpenAI with system text": (
        {"messages": [SYSTEM, USER, ASSISTANT]},
        ("You answer briefly.\n\nWhy was claim 12 denied?", "", "A referral was missing."),
    ),
    "OpenAI's developer": (
        {"messages": [{**SYSTEM, "role": "developer"}, USER, ASSISTANT]},
        (f"You answer briefly.\n\n{WHY}", "", BECAUSE),
    ),
    "an empty system text": ({"messages": [{**SYSTEM, "content": ""}, USER, ASSISTANT]}, (WHY, "", BECAUSE)),
    "content in parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Why?"}, {"type": "text", "text": "Code 97"}]},
                ASSISTANT,
            ]
        },
        ("Why?\nCode 97", "", BECAUSE),
    ),
    "weight 1": ({"messages": [USER, {**ASSISTANT, "weight": 1}]}, (WHY, "", BECAUSE)),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "system", "value": "You answer briefly."},
                {"from": "human", "value": "Why?"},
                {"from": "gpt", "value": "So."},
            ]
        },
        ("You answer briefly.\n\nWhy?", "", "So."),
    ),
    "conversations with roles": ({"conversations": [USER, ASSISTANT]}, (WHY, "", BECAUSE)),
    "a prompt beside messages": ({"prompt": "Why?", "messages": [USER, ASSISTANT]}, (WHY, "", BECAUSE)),
    "messages as JSON text": ({"messages": json.dumps([USER, ASSISTANT])}, (WHY, "", BECAUSE)),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_record_is_read_by_its_form(form: str, read_one: ReadOne) -> None:
    row, expected = FORMS[form]
    assert read_one({"id": "c-1", **row}) == expected


@pytest.mark.parametrize("name", ["messages", "conversations"])
@pytest.mark.parametrize("users", ["user", "human"])
@pytest.mark.parametrize("assistants", ["assistant", "gpt", "model"])
def test_the_usual_names_of_speakers_are_known(name: str, users: str, assistants: str, read_one: ReadOne) -> None:
    row = {name: [{"from": users, "value": "Why?"}, {"from": assistants, "value": "So."}]}
    assert read_one(row) == ("Why?", "", "So.")


def test_parquet_may_hold_messages_as_lists_of_structs(tmp_path: Path) -> None:
    """The first message of a struct column lacks the weight that another has: it is null there."""
    path = tmp_path / "r.parquet"
    rows = [{"messages": [SYSTEM, USER, {**ASSISTANT, "weight": 1}]}, {"messages": [USER_2, ASSISTANT_2]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert read(path) == [(f"You answer briefly.\n\n{WHY}", "", BECAUSE), ("What now?", "", "Send it.")]


def test_the_form_of_each_file_is_reported(tmp_path: Path) -> None:
    expected: dict[str, str] = {}
    for number, name in enumerate(("Dolly", "prompt and completion", "OpenAI", "ShareGPT")):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps(FORMS[name][0]) + "\n", "utf-8")
        expected[str(path)] = ["instruction", "prompt/completion", "messages", "conversations"][number]
    forms: dict[str, str] = {}
    assert len(list(iter_records(list(expected), ReadOptions(), needs_response=True, forms=forms))) == 4
    assert forms == expected


def test_a_record_of_another_form_in_the_file_is_invalid(write_jsonl: Callable[..., Path]) -> None:
    """The first record that has a form decides; it follows one that has none and one that cannot be parsed."""
    alpaca, chat = {"instruction": "Why?", "output": "So."}, {"messages": [USER, ASSISTANT]}
    path = write_jsonl([{"id": 1}, alpaca, chat, alpaca, {"prompt": "Why?", "completion": "So."}])
    path.write_text('{"id"\n' + path.read_text("utf-8"), "utf-8")
    unparsable, unknown, first, other, second, third = read(path)
    assert first == second == ("Why?", "", "So.")
    assert str(unparsable).startswith("1: is not valid JSON")
    assert str(unknown).startswith(
        "2: has no fields of a known form; it has 'id'. Expected instruction and response (or"
    )
    assert other == (
        "4: is of the form messages, but the file is of the form instruction since line 3; put the records of each "
        "form in a file of their own."
    )
    assert str(third).startswith("6: is of the form prompt/completion, but the file is of the form instruction")


def test_fields_that_the_user_names_win_over_the_form(read_one: ReadOne) -> None:
    row = {
        "instruction": "other",
        "question": "Why?",
        "answer": "So.",
        "messages": [USER, ASSISTANT],
        "plan": "Code 97",
    }
    fields = {"instruction": "question", "response": "answer", "input": "plan"}
    assert read_one(row, **fields) == ("Why?", "Code 97", "So.")
    assert read_one({"prompt": "Why?", "answer": "So."}, response="answer") == ("Why?", "", "So.")
    assert read_one({"messages": [USER, ASSISTANT], "plan": "Code 97"}, input="plan") == (WHY, "Code 97", BECAUSE)


def test_two_fields_for_one_part_are_ambiguous(read_one: ReadOne) -> None:
    """Neither is dropped silently."""
    row = {"instruction": "Why?", "response": "So.", "output": "Else."}
    assert read_one(row) == (
        "1: has both 'response' and 'output'; set data.response_field to the one that is the response of a record."
    )
    assert read_one(row, response="output") == ("Why?", "", "Else.")
    assert "has both 'input' and 'context'" in read_one({**row, "output": "", "input": "a", "context": "b"})


# Conversations of several exchanges

LONG = [SYSTEM, USER, ASSISTANT, USER_2, ASSISTANT_2]


@pytest.mark.parametrize(
    "row", [{"messages": LONG}, {"prompt": LONG[:4], "completion": LONG[4:]}], ids=["chat", "prompt"]
)
def test_several_exchanges_are_refused_unless_turns_selects_one(row: dict[str, Any], read_one: ReadOne) -> None:
    refused = read_one(row)
    assert "holds more than one exchange of user and assistant; expected one. Set data.turns to 'first' or" in refused
    assert read_one(row, turns="first") == (f"You answer briefly.\n\n{WHY}", "", BECAUSE)
    assert read_one(row, turns="last") == ("You answer briefly.\n\nWhat now?", "", "Send it.")


def test_turns_has_no_effect_on_one_exchange(read_one: ReadOne) -> None:
    for turns in ("error", "first", "last"):
        assert read_one({"messages": [USER, ASSISTANT]}, turns=turns) == (WHY, "", BECAUSE)


def test_an_unknown_turns_is_refused(read_one: ReadOne) -> None:
    with pytest.raises(InputError, match=r"data\.turns: 'all' is unknown; expected one of error, first, last"):
        read_one({"messages": LONG}, turns="all")


def test_predict_needs_no_answer(read_one: ReadOne) -> None:
    for row in ({"messages": [USER]}, {"prompt": [USER]}, {"prompt": WHY}, {"prompt": [USER], "completion": []}):
        assert read_one(row, needs_response=False) == (WHY, "", "")
    assert read_one({"messages": [USER, ASSISTANT, USER_2]}, needs_response=False, turns="last") == (
        "What now?",
        "",
        "",
    )
    assert read_one({"messages": [USER, ASSISTANT]}, needs_response=False) == (WHY, "", BECAUSE)


# Faults of a conversation

TOOL_CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "call_1"}]}
INVALID_CHATS: dict[str, tuple[Any, str]] = {
    "null": (None, "field 'messages' has no value; expected a list of messages"),
    "an object": (USER, "field 'messages' is an object; expected a list of messages"),
    "text": ("[{'role': 'user'}]", "field 'messages' is text; expected a list of messages, in a CSV file as JSON"),
    "no messages": ([], "field 'messages' is an empty list"),
    "a text as message": ([WHY], "field 'messages': message 1 is text; expected an object with role and content"),
    "no role": ([{"content": WHY}, ASSISTANT], "message 1 has no role; expected system, user or assistant"),
    "an unknown role": ([{**USER, "role": "narrator"}, ASSISTANT], "message 1 has another role; expected system, user"),
    "a tool's role": ([USER, {"role": "tool", "content": "x"}], "message 2 is from a tool; expected system, user"),
    "a function's role": ([USER, {"from": "function_call", "value": "x"}], "message 2 is from a tool; expected"),
    "a call of a tool": ([USER, TOOL_CALL], "message 2 calls a tool; expected text alone"),
    "an image": (
        [{**USER, "content": [{"type": "image_url"}]}, ASSISTANT],
        "message 1: part 1 is not of the type text",
    ),
    "no content": ([USER, {"role": "assistant"}], "message 2 has no value; expected text"),
    "an empty content": ([USER, {**ASSISTANT, "content": ""}], "message 2 is empty; expected text"),
    "no parts": ([USER, {**ASSISTANT, "content": []}], "message 2 is empty; expected text"),
    "a blank content": ([{**USER, "content": " \n"}, ASSISTANT], "message 1 is blank; expected text"),
    "half a character": ([USER, {**ASSISTANT, "content": "\ud83d"}], "message 2 holds half of a surrogate pair"),
    "an assistant first": ([ASSISTANT, USER], "message 1 is from the assistant; expected one from the user before it"),
    "two users": ([USER, USER_2, ASSISTANT], "message 2 is from the user, as is the one before; expected user and"),
    "two assistants": ([USER, ASSISTANT, ASSISTANT_2], "message 3 is from the assistant, as is the one before"),
    "no answer": ([SYSTEM, USER], "ends with a message from the user; expected the assistant's answer after it"),
    "a late system text": ([USER, SYSTEM, ASSISTANT], "message 2 is from the system; expected that at the beginning"),
    "system text alone": ([SYSTEM], "field 'messages' holds no message from the user; expected one"),
    "weight 0": ([USER, {**ASSISTANT, "weight": 0}], "message 2 has the weight 0, so nothing of it is to be learned"),
    "another weight": ([USER, {**ASSISTANT, "weight": 0.5}], "message 2 has a weight other than 0 and 1"),
    "a header": (
        [USER, {**ASSISTANT, "content": "So.\n### Response: none"}],
        "field 'messages' has a line that begins with '### Response:'",
    ),
}


@pytest.mark.parametrize("fault", INVALID_CHATS)
def test_a_faulty_conversation_is_invalid_with_the_reason(fault: str, write_jsonl: Callable[..., Path]) -> None:
    messages, reason = INVALID_CHATS[fault]
    good = {"messages": [USER, ASSISTANT]}
    for turns in ("error", "first", "last"):
        first, invalid, last = read(write_jsonl([good, {"messages": messages}, good]), turns)
        assert first == last == (WHY, "", BECAUSE)
        assert str(invalid).startswith("2: field 'messages'")
        assert reason in invalid


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": [USER], "completion": [USER_2]}, "field 'completion' is not one message from the assistant"),
        ({"prompt": [USER], "completion": [ASSISTANT] * 2}, "field 'completion' is not one message from the assistant"),
        ({"prompt": [USER], "completion": []}, "field 'completion' is an empty list"),
        ({"prompt": [USER], "completion": None}, "field 'completion' has no value; expected text"),
        ({"prompt": [], "completion": "So."}, "field 'prompt' is an empty list"),
        ({"prompt": [USER, ASSISTANT], "completion": "So."}, "field 'completion' is from the assistant, as is the one"),
        ({"prompt": "Why?", "completion": 3}, "field 'completion' is a number; expected text"),
        ({"prompt": "Why?"}, "has no field 'completion'; it has 'prompt'. Expected text there (data.*_field renames"),
        ({"instruction": "Why?"}, "has no field 'response'; it has 'instruction'. Expected text there or in 'output'"),
    ],
)
def test_a_faulty_pair_is_invalid_with_the_reason(row: dict[str, Any], reason: str, read_one: ReadOne) -> None:
    assert reason in read_one(row)


# Files without a form


def test_a_file_of_no_known_form_is_one_line(write_jsonl: Callable[..., Path]) -> None:
    """It names the fields that look like names, and every form."""
    path = write_jsonl([{"question": "Why?", "answer": "So.", "CLM-4417": n} for n in range(5)])
    invalid = list(iter_records([str(path)], ReadOptions(), needs_response=True))
    (line,) = describe_invalid(invalid)
    assert line == (
        f"5 records, the first at {path}:1, {path}:2 and {path}:3: has no fields of a known form; it has 'question', "
        "'answer' and 1 other. Expected instruction and response (or output), prompt and completion, messages, or "
        "conversations; data.instruction_field and data.response_field give other names."
    )


@pytest.mark.parametrize(
    "text",
    [
        "### Instruction:\nWhy?\n\n### Response:\nSo.",
        "<s>[INST] Why? [/INST] So.",
        "<|im_start|>user\nWhy?",
        "Instruct: a",
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_a_text_column_with_a_template_is_refused(text: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"r.{ending}"
    quoted = '"' + text.replace('"', '""') + '"'
    path.write_text(json.dumps({"text": text}) + "\n" if ending == "jsonl" else f"text\n{quoted}\n", "utf-8")
    try:
        message = str(read(path)[0])
    except InputError as error:  # a table is refused as a whole
        message = str(error)
        assert ending == "csv"
    assert "'text' already holds a template (" in message
    assert "Split it into the parts of a record, without the template. Expected instruction and response" in message


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_table_without_the_columns_of_a_record_is_one_error(ending: str, tmp_path: Path) -> None:
    """Whatever the number of its rows, and whatever on_bad_record is."""
    path = tmp_path / f"r.{ending}"

    def write(**columns: str) -> None:
        if ending == "parquet":
            parquet.write_table(pyarrow.table({name: [value] * 30 for name, value in columns.items()}), path)
        else:
            path.write_text(",".join(columns) + "\n" + (",".join(columns.values()) + "\n") * 30, "utf-8")

    write(question="Why?", answer="So.")
    with pytest.raises(InputError) as raised:
        read(path)
    assert str(raised.value).startswith(
        f"{path}: has no columns of a known form; its columns are 'question', 'answer'. Expected instruction and"
    )
    write(instruction="Why?", answer="So.")
    with pytest.raises(InputError, match=r"has no column 'response'; its columns are 'instruction', 'answer'"):
        read(path)
    with pytest.raises(InputError, match=r"has no column 'answr'; its columns are 'instruction', 'answer'"):
        read(path, response="answr")
    assert read(path, needs_response=False) == [("Why?", "", "")] * 30
    assert read(path, response="answer") == [("Why?", "", "So.")] * 30


def test_a_csv_file_without_a_header_shows_none_of_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("Zanzibar,Why was Zanzibar denied?\nb,c\n", "utf-8")
    with pytest.raises(InputError) as raised:
        read(path)
    assert "its first line does not hold names" in str(raised.value)
    assert "Zanzibar" not in str(raised.value)
