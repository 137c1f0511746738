"""Records with facts, for the tests of metrics and baselines."""

from collections.abc import Callable

import pytest

from lit_phi2.data.records import Fact, Record

NewRecord = Callable[..., Record]


@pytest.fixture
def new_record() -> NewRecord:
    """Makes a record of a reference and (text, kind) facts."""

    def new(
        response: str,
        *facts: tuple[str, str],
        instruction: str = "Why?",
        input: str = "",
        form: str = "",
        category: str = "",
    ) -> Record:
        location = "records.jsonl:1"
        return Record("r", instruction, input, response, location, category, form, tuple(Fact(*fact) for fact in facts))

    return new


@pytest.fixture
def three_records(new_record: NewRecord) -> list[Record]:
    """Six facts of three kinds, in two forms and two categories."""
    response = "r" * 60
    return [
        new_record(
            response,
            ("aaaa", "copied"),
            ("bbbb", "known"),
            ("cccc", "known"),
            instruction="1",
            form="explain",
            category="bundling",
        ),
        new_record(response, ("dddd", "known"), instruction="2", form="draft", category="bundling"),
        new_record(
            response,
            ("eeee", "copied"),
            ("ffff", "reasoned"),
            instruction="3",
            form="explain",
            category="timely filing",
        ),
    ]


@pytest.fixture
def three_completions() -> list[str]:
    """They contain 2 of 3 facts, 0 of 1 and 2 of 2."""
    return ["aaaa and cccc", "nothing", "ffff, then eeee"]
