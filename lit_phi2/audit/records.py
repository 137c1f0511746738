"""Records audit: losses and texts of records -> findings, each by path:line, the worst of each kind first.

    label_error             the adapter's loss is high, or fell little, beside records of the same category and form
    memorised               the loss fell further below the base's than that of any record that was not trained on
    near_duplicate          two records share most of their wording
    boilerplate             many records have one response, numbers apart
    unsupported_identifier  the response has an identifier that the prompt lacks

A finding has no text of a record. A high rank is a reason to read the record, and not a proof.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_phi2.audit.duplicates import boilerplate_sizes, near_duplicates
from lit_phi2.audit.identifiers import KINDS, Identifier, find_identifiers, plain_text
from lit_phi2.data.records import Record

FINDING_KINDS = ("label_error", "memorised", "near_duplicate", "boilerplate", "unsupported_identifier")

MIN_SIMILARITY = 0.7  # of near duplicates
MIN_BOILERPLATE = 3  # records with one response
MIN_LABEL_ERROR = 3.0  # robust standard deviations above the median of the group
MIN_GROUP = 10  # records of a category and form; fewer are compared with all

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Finding:
    """What is conspicuous about a record.

    Attributes:
        kind: of FINDING_KINDS.
        rank: from 1, within the kind.
        split, location, id: of the record.
        score: robust standard deviations, nats, similarity, or a number of records or values, as `meaning` says.
        meaning: of the score.
        other: location of the record that it duplicates.
    """

    kind: str
    rank: int
    split: str
    location: str
    id: str
    score: float
    meaning: str
    other: str = ""


@dataclass(frozen=True, slots=True)
class AuditedRecords:
    """Records of all splits with their losses.

    Attributes:
        records: with their texts.
        splits: name of each record's split.
        base, adapter: (n,) nats per supervised token.
    """

    records: Sequence[Record]
    splits: Sequence[str]
    base: Array
    adapter: Array


def audit_records(audited: AuditedRecords) -> list[Finding]:
    """All findings, by kind and rank.

    Raises:
        InputError: a library is missing.
    """
    records = audited.records
    trained = np.array([split == "train" for split in audited.splits])
    drops = audited.base - audited.adapter
    errors = label_error_scores(audited)
    others = drops[~trained]
    is_memorised = trained & (drops > (others.max() if len(others) else np.inf))
    sizes = boilerplate_sizes([record.response for record in records])
    unsupported = np.array([len(unsupported_identifiers(record)) for record in records])
    meaning = "robust deviations of the loss, or of its fall, from records of the group"
    findings = _ranked(audited, "label_error", meaning, errors, errors >= MIN_LABEL_ERROR)
    findings += _ranked(audited, "memorised", "nats per token below the base", drops, is_memorised)
    texts = [f"{record.instruction}\n{record.input}\n{record.response}" for record in records]
    for rank, (similarity, first, second) in enumerate(near_duplicates(texts, MIN_SIMILARITY), 1):
        found = Finding("near_duplicate", rank, audited.splits[second], records[second].location, records[second].id,
                        round(similarity, 4), "share of three words in a row", records[first].location)  # fmt: skip
        findings.append(found)
    findings += _ranked(audited, "boilerplate", "records with this response", sizes, sizes >= MIN_BOILERPLATE)
    meaning = "identifiers that the prompt lacks"
    return findings + _ranked(audited, "unsupported_identifier", meaning, unsupported, unsupported > 0)


def label_error_scores(audited: AuditedRecords) -> Array:
    """(n,): how far a record's loss lies above, or its fall lies below, the median of its group.

    In units of 1.4826 median absolute deviations, which are standard deviations of a normal distribution. The larger
    of the two counts.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for index, record in enumerate(audited.records):
        groups.setdefault((record.category, record.form), []).append(index)
    drops = audited.base - audited.adapter
    scores = np.maximum(_deviations(audited.adapter, audited.adapter), -_deviations(drops, drops))
    for members in groups.values():
        if len(members) >= MIN_GROUP:
            loss, drop = audited.adapter[members], drops[members]
            scores[members] = np.maximum(_deviations(loss, loss), -_deviations(drop, drop))
    return scores


def unsupported_identifiers(record: Record) -> dict[str, Identifier]:
    """The identifiers of the response that the prompt lacks, each where it is first, by letters and digits.

    A date is none.
    """
    source = _joined(plain_text(f"{record.instruction} {record.input}"))
    text = plain_text(record.response)
    kinds = [kind for kind in KINDS if kind != "dob"]
    found: dict[str, Identifier] = {}
    for each in find_identifiers(text, kinds):
        value = _joined(text[each.start : each.end])
        if value not in source:
            found.setdefault(value, each)
    return found


def to_row(finding: Finding, losses: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """A line of audit_records.jsonl.

    Args:
        finding: of a record.
        losses: location -> nats per token of base and adapter.
    """
    base, adapter = losses[finding.location]
    return {**asdict(finding), "base_loss": round(base, 5), "adapter_loss": round(adapter, 5)}


def format_findings(findings: Sequence[Finding], top: int) -> str:
    """A table of the first findings of each kind, and how many there are."""
    lines = []
    for kind in FINDING_KINDS:
        same_kind = [finding for finding in findings if finding.kind == kind]
        meaning = f" (score: {same_kind[0].meaning})" if same_kind else ""
        lines.append(f"{kind}: {len(same_kind):,}{meaning}")
        for finding in same_kind[:top]:
            other = f"  like {finding.other}" if finding.other else ""
            lines.append(f"  {finding.rank:>4}  {finding.score:>8.3f}  {finding.split:<5}  {finding.location}{other}")
    return "\n".join(lines)


def _ranked(
    audited: AuditedRecords, kind: str, meaning: str, scores: NDArray[Any], chosen: NDArray[Any]
) -> list[Finding]:
    order = [int(index) for index in np.argsort(-scores, kind="stable") if chosen[index]]
    return [
        Finding(kind, rank, audited.splits[index], audited.records[index].location, audited.records[index].id,
                round(float(scores[index]), 4), meaning)
        for rank, index in enumerate(order, 1)
    ]  # fmt: skip


def _deviations(values: Array, reference: Array) -> Array:
    centre = np.median(reference)
    spread = 1.4826 * np.median(np.abs(reference - centre))
    return (values - centre) / max(spread, 1e-6)


def _joined(text: str) -> str:
    return "".join(filter(str.isalnum, text)).lower()
