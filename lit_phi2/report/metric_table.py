"""Metric table: test_metrics.json -> rows for the page, each with its definition; and tables by form and category.

    {"completions": {"adapter": {"fact recall": {"mean": 0.78, "low": ...}}, "base": {...}}}
      ->  MetricRow("fact recall", "fraction of ...", {"adapter": Interval(...), "base": Interval(...)})

A file that somebody changed has fewer rows: a value that is no interval is left out.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from lit_phi2.evaluation.metrics import Interval
from lit_phi2.report.text import redacted
from lit_phi2.utils.json_objects import number

SYSTEMS = {
    "adapter": "the base with the trained adapter",
    "base": "the base alone",
    "copy_prompt": "the prompt copied back, no model",
    "nearest": "the response of the most similar training record, no model",
}
FAULTS = ("empty", "echo", "unsupported amounts", "unsupported dates", "unsupported identifiers")
GROUP_METRICS = ("fact recall", "chrF", *FAULTS)

_DEFINITIONS = {
    "fact recall": "Fraction of a record's facts that the completion contains. Higher is better.",
    "ROUGE-L": "Longest common run of words with the reference, as F1. Higher is better.",
    "chrF": "Character n-grams shared with the reference, as F2. Higher is better.",
    "length ratio": "Words of the completions per word of the references. Best near 1.",
    "repeated 8-gram": "Fraction of completions that say the same eight words twice. Lower is better.",
    "empty": "Fraction of completions without a word. Lower is better.",
    "echo": "Fraction of completions that begin by copying the prompt. Lower is better.",
    "eos_rate": "Fraction of completions that end by themselves. Higher is better.",
}
_KEYS = ("mean", "low", "high", "records")
_FINITE = number(-1e12, 1e12)


@dataclass(frozen=True, slots=True)
class MetricRow:
    """A metric of every system.

    Attributes:
        name, definition: in words.
        intervals: by system; a system without the metric is absent.
    """

    name: str
    definition: str
    intervals: dict[str, Interval]

    @property
    def records(self) -> int:
        return next(iter(self.intervals.values())).records

    @property
    def plot(self) -> Markup:
        """The first two systems on a line from 0 to 1: an interval with its mean, and the mean of the other."""
        first, *others = self.intervals.values()
        if not all(0 <= value <= 1 for each in (first, *others[:1]) for value in (each.low, each.high)):
            return Markup("")
        low, mean, high = (f"{4 + 112 * value:.1f}" for value in (first.low, first.mean, first.high))
        parts = ['<svg class="interval" viewBox="0 0 120 16" aria-hidden="true"><path class="axis" d="M4 8H116"/>']
        if others:
            parts.append(f'<circle class="other" cx="{4 + 112 * others[0].mean:.1f}" cy="8" r="3.6"/>')
        parts.append(
            f'<path class="range" d="M{low} 8H{high}"/><circle class="mean" cx="{mean}" cy="8" r="3.6"/></svg>'
        )
        return Markup("".join(parts))


@dataclass(frozen=True, slots=True)
class GroupRow:
    """The metrics of the records of one form or category: metric -> system -> interval."""

    name: str
    records: int
    metrics: dict[str, dict[str, Interval]]


def read_columns(metrics: Mapping[str, Any]) -> dict[str, dict[str, Interval]]:
    """The intervals of test_metrics.json: system -> metric -> interval, in the order of the file."""
    completions = metrics.get("completions")
    columns = completions.items() if isinstance(completions, dict) else ()
    found = {name: _intervals(rows) for name, rows in columns if isinstance(rows, dict)}
    return {name: rows for name, rows in found.items() if rows}


def metric_rows(columns: Mapping[str, Mapping[str, Interval]]) -> list[MetricRow]:
    """The metrics over all records."""
    names = dict.fromkeys(name for rows in columns.values() for name in rows if not _group(name))
    return [
        MetricRow(
            redacted(name)[0],
            _definition(name),
            {system: rows[name] for system, rows in columns.items() if name in rows},
        )
        for name in names
    ]


def group_rows(columns: Mapping[str, Mapping[str, Interval]], kind: str) -> list[GroupRow]:
    """The metrics by form or by category.

    Args:
        columns: of `read_columns`.
        kind: form or category.
    """
    groups: dict[str, dict[str, dict[str, Interval]]] = {}
    for system, rows in columns.items():
        for name, interval in rows.items():
            if (found := _group(name)) and found[0] == kind:
                groups.setdefault(found[1], {}).setdefault(found[2], {})[system] = interval
    return [
        GroupRow(redacted(group)[0], max(each.records for of in metrics.values() for each in of.values()), metrics)
        for group, metrics in sorted(groups.items())
    ]


def _group(name: str) -> tuple[str, str, str] | None:
    """Kind, group and metric of a row over one group.

    >>> _group("form explain"), _group("category a: b: chrF"), _group("chrF")
    (('form', 'explain', 'fact recall'), ('category', 'a: b', 'chrF'), None)
    """
    match = re.fullmatch(rf"(form|category) (.*?)(?:: ({'|'.join(GROUP_METRICS[1:])}))?", name, re.DOTALL)
    return (match[1], match[2], match[3] or "fact recall") if match else None


def _definition(name: str) -> str:
    if name.startswith("facts "):
        return "The same, counting only the facts of this kind."
    if name.startswith("unsupported "):
        kind = name.removeprefix("unsupported ")
        return f"Fraction of completions with {kind} that neither prompt nor reference has. Lower is better."
    return _DEFINITIONS.get(name, "")


def _intervals(rows: Mapping[str, Any]) -> dict[str, Interval]:
    found = {}
    for name, value in rows.items():
        if isinstance(value, dict) and all(_FINITE.matches(value.get(key)) for key in _KEYS):
            mean, low, high, records = (float(value[key]) for key in _KEYS)
            found[name] = Interval(mean, low, high, int(records))
    return found
