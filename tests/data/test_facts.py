"""Facts, category and form, which `test` reads in addition to a record's other fields."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_phi2.data.records import Fact, ReadOptions, Record, read_records

Jsonl = Callable[..., Path]


def read_facts(path: Path) -> tuple[list[Record], list[str]]:
    records, invalid = read_records([str(path)], ReadOptions(), needs_response=True, with_facts=True)
    return records, [str(record) for record in invalid]


def row(**fields: Any) -> dict[str, Any]:
    return {"instruction": "Why?", "response": "Because.", **fields}


def test_facts_category_and_form_are_read_if_present(write_jsonl: Jsonl) -> None:
    facts = [
        {"text": "CLM-12", "kind": "copied", "note": "more"},
        {"text": "180 days", "kind": "known"},
    ]
    absent = [row(), row(facts=None), row(facts=""), row(facts=[], category=None, form=3)]
    path = write_jsonl([row(facts=facts, category="bundling", form="next\n steps"), *absent])
    records, invalid = read_facts(path)
    assert invalid == []
    assert records[0].facts == (Fact("CLM-12", "copied"), Fact("180 days", "known"))
    assert (records[0].category, records[0].form) == ("bundling", "next steps")
    assert [(record.facts, record.category, record.form) for record in records[1:]] == [((), "", "")] * 4


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ("CLM-12", "is text; expected a list"),
        ({"text": "a", "kind": "b"}, "is an object; expected a list"),
        (0, "is a number; expected a list"),
        ({}, "is an object; expected a list"),
        (["CLM-12"], 'holds text; expected {"text": '),
        ([{"text": "CLM-12"}], "holds an object without text in 'text' and in 'kind'; expected"),
        (
            [{"text": "fine", "kind": "copied"}, {"text": " ", "kind": "copied"}],
            "holds an object without text in 'text'",
        ),
        ([{"text": 12, "kind": "copied"}], "holds an object without text in 'text'"),
        ([{"text": "CLM-12", "kind": None}], "holds an object without text in 'text' and in 'kind'; expected"),
        ([None], "holds null; expected"),
    ],
)
def test_malformed_facts_are_invalid_with_path_and_line(facts: Any, message: str, write_jsonl: Jsonl) -> None:
    path = write_jsonl([row(), row(facts=facts), row()])
    records, invalid = read_facts(path)
    assert len(records) == 2
    assert len(invalid) == 1
    assert invalid[0].startswith(f"{path}:2: field 'facts' ")
    assert message in invalid[0]
