"""Facts: what `test` reads of a record in addition to its texts.

{"category": "bundling", "form": "next steps", "facts": [{"text": "CLM-12", "kind": "copied"}], ...}
  ->  category, form   groups whose metrics are reported apart
      facts            texts that a correct completion contains
"""

import sys
from dataclasses import dataclass
from typing import Any

from lit_phi2.data.invalid import RecordError
from lit_phi2.data.text import NOT_UNICODE, describe_kind, is_valid_unicode

_FACT_FORM = '{"text": "...", "kind": "..."}'


@dataclass(frozen=True, slots=True)
class Fact:
    """A short text that a correct completion contains.

    Attributes:
        text: compared without regard to case and whitespace.
        kind: where it comes from. The packaged claims use copied (from the prompt), known (from the domain) and
            reasoned (derived).
    """

    text: str
    kind: str


def read_facts(row: dict[str, Any]) -> tuple[Fact, ...]:
    """The facts of a record, which may have none.

    Raises:
        RecordError: they are malformed.
    """
    facts = row.get("facts")
    if facts in (None, ""):  # "" is the empty cell of a CSV file
        return ()
    if not isinstance(facts, list):
        raise RecordError(f"field 'facts' is {describe_kind(facts)}; expected a list of {_FACT_FORM}.")
    for fact in facts:
        texts = (fact.get("text"), fact.get("kind")) if isinstance(fact, dict) else (None, None)
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise RecordError(f"field 'facts' holds {_describe_item(fact)}; expected {_FACT_FORM}.")
        if not all(is_valid_unicode(str(text)) for text in texts):
            raise RecordError(f"field 'facts' {NOT_UNICODE}")
    return tuple(Fact(fact["text"], fact["kind"]) for fact in facts)


def read_groups(row: dict[str, Any]) -> dict[str, str]:
    """Category and form of a record, those of the two that are text.

    Raises:
        RecordError: one is not valid Unicode.
    """
    groups = {name: row[name] for name in ("category", "form") if isinstance(row.get(name), str)}
    for name, text in groups.items():
        if not is_valid_unicode(text):
            raise RecordError(f"field {name!r} {NOT_UNICODE}")
    # A group becomes a row of a table. Few values are shared by all records, so each is kept in memory once.
    return {name: sys.intern(" ".join(text.split())) for name, text in groups.items()}


def _describe_item(fact: Any) -> str:
    """What an item is, without its values."""
    if not isinstance(fact, dict):
        return describe_kind(fact)
    return "an object without text in 'text' and in 'kind'"
