"""Audits: what `audit` wrote into the folder of a run -> its verdict and counts for the page.

    audit_leakage.json    ->  LeakageAudit: passed or not, and every figure as a name with its value
    audit_records.jsonl   ->  KindCount of each kind of finding, with the first places

Figures of the leakage audit are shown by the names that the file has, whatever they are.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_phi2.audit.records import FINDING_KINDS
from lit_phi2.report.text import redact_tree, redacted
from lit_phi2.utils.files import read_json_lines
from lit_phi2.utils.json_objects import read_json_object

RECORDS_FILE, LEAKAGE_FILE = "audit_records.jsonl", "audit_leakage.json"
NUM_PLACES = 5  # of each kind

MEANINGS = {
    "label_error": "The loss stays high, or falls little, beside records of the same category and form.",
    "memorised": "The loss fell further below the base's than that of any record it was not trained on.",
    "near_duplicate": "Two records share most of their wording.",
    "boilerplate": "Many records have one response, numbers apart.",
    "unsupported_identifier": "The response has an identifier that its prompt lacks.",
}


@dataclass(frozen=True, slots=True)
class LeakageAudit:
    """What audit --what leakage measured.

    Attributes:
        passed: its verdict; None if the file has none.
        figures: name and value, as text; an interval is one value.
        auc: of membership, with its interval and the threshold, as text; empty without it.
    """

    passed: bool | None
    figures: list[tuple[str, str]]
    auc: str


@dataclass
class KindCount:
    """Findings of one kind: how many, and file and line of the first."""

    count: int = 0
    places: list[str] = field(default_factory=list)


def read_leakage(folder: Path) -> LeakageAudit | None:
    """The leakage audit of a run; None if it was not made.

    Raises:
        InputError: the file is no JSON object.
    """
    if not (folder / LEAKAGE_FILE).is_file():
        return None
    content = redact_tree(read_json_object(folder / LEAKAGE_FILE))
    passed = content.pop("passed", None)
    auc = content.get("membership", {}).get("auc") if isinstance(content.get("membership"), dict) else None
    shown = f"{_value(auc)}, at most {_value(content.get('max_auc'))} passes" if _is_interval(auc) else ""
    return LeakageAudit(passed if isinstance(passed, bool) else None, list(_figures(content)), shown)


def read_record_audit(folder: Path) -> dict[str, KindCount] | None:
    """The number of findings of each kind; None if the audit was not made.

    Raises:
        InputError: the file is damaged.
    """
    file = folder / RECORDS_FILE
    if not file.is_file():
        return None
    kinds = {kind: KindCount() for kind in FINDING_KINDS}
    for row in read_json_lines(file):
        kind = kinds.setdefault(redacted(str(row.get("kind")))[0], KindCount())
        kind.count += 1
        if len(kind.places) < NUM_PLACES:
            kind.places.append(_place(str(row.get("location", ""))))
    return kinds


def _place(location: str) -> str:
    """File and line, without the folders.

    >>> _place("/home/ann/a.jsonl:7")
    'a.jsonl:7'
    """
    file, colon, line = location.replace("\\", "/").rpartition("/")[2].rpartition(":")
    return redacted(file)[0] + colon + line


def _figures(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and not _is_interval(value):
        for key, item in value.items():
            yield from _figures(item, f"{name} {key}".strip().replace("_", " "))
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for number, item in enumerate(value, 1):
            yield from _figures(item, f"{name} {number}")
    else:
        yield name, _value(value)


def _is_interval(value: Any) -> bool:
    return isinstance(value, dict) and {"low", "high"} < set(value) and len(value) == 3


def _value(value: Any) -> str:
    """
    >>> _value({"value": 0.5124, "low": 0.4, "high": 0.6}), _value(True), _value(1200), _value([1, 4])
    ('0.512 [0.400, 0.600]', 'yes', '1,200', '1, 4')
    """
    if _is_interval(value):
        middle = next(item for key, item in value.items() if key not in ("low", "high"))
        return f"{_value(middle)} [{_value(value['low'])}, {_value(value['high'])}]"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3f}"
    return ", ".join(map(_value, value)) if isinstance(value, list) else str(value)
