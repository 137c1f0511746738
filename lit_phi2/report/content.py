"""Content: the folder of a run -> everything that its page says, as plain values.

    config.yaml, provenance.json   ->  title, settings, digests
    events.out.tfevents*           ->  curves
    ledger.parquet                 ->  counts, histograms
    test_metrics.json, test_completions.jsonl, samples.jsonl, audit_*.json*

Every part may be absent: a run that was not tested has no metrics. What comes from records passes through `redacted`
here, except the samples.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from lit_phi2.audit.ledger import LEDGER_FILE
from lit_phi2.audit.provenance import CONFIG_FILE, PROVENANCE_FILE, public_config, read_config, read_statement
from lit_phi2.errors import InputError
from lit_phi2.evaluation.metrics import Interval
from lit_phi2.report.audits import LEAKAGE_FILE, RECORDS_FILE, KindCount, LeakageAudit, read_leakage, read_record_audit
from lit_phi2.report.charts import histogram, line_chart
from lit_phi2.report.curves import Curves, read_curves
from lit_phi2.report.ledger_counts import SplitCounts, read_ledger_counts
from lit_phi2.report.metric_table import GroupRow, MetricRow, group_rows, metric_rows, read_columns
from lit_phi2.report.provenance_tables import Origin, read_origin
from lit_phi2.report.samples import RankedSamples, Sample, ranked_samples, training_samples
from lit_phi2.report.summary import audit_sentences, plural, test_sentences, training_sentences
from lit_phi2.report.text import redact_tree, redacted
from lit_phi2.utils.json_objects import read_json_object

METRICS_FILE = "test_metrics.json"
_ANY_OF = (CONFIG_FILE, PROVENANCE_FILE, LEDGER_FILE, METRICS_FILE, LEAKAGE_FILE, RECORDS_FILE)


@dataclass(frozen=True, slots=True)
class Figure:
    """A drawing with its title, and a sentence below it."""

    title: str
    drawing: Markup
    caption: str
    legend: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Content:
    """A page about a run; a part that the run does not have is None or empty."""

    name: str
    version: str
    facts: list[tuple[str, str]]
    summary: list[str]
    tiles: list[tuple[str, str, str]]
    training: list[Figure]
    scalars: list[tuple[str, float]]
    systems: list[str]
    metrics: list[MetricRow]
    groups: dict[str, list[GroupRow]]
    ranked: RankedSamples | None
    samples: list[Sample]
    counts: dict[str, SplitCounts]
    lengths: list[Figure]
    max_length: int | None
    leakage: LeakageAudit | None
    record_audit: dict[str, KindCount] | None
    config: dict[str, list[tuple[str, str]]]
    origin: Origin | None


def read_content(folder: Path) -> Content:
    """What is known about a run.

    Args:
        folder: of the run.

    Raises:
        InputError: the folder has nothing of a run, or one of its files is damaged.
    """
    curves = read_curves(folder)
    if not curves.scalars and not any((folder / name).is_file() for name in _ANY_OF):
        raise InputError(f"{folder}: has nothing of a run; expected {', '.join(_ANY_OF)} or an event file.")
    statement = read_statement(folder)
    origin = read_origin(statement) if statement else None
    config = _config(folder, statement)
    data = _section(config, "data")
    max_length = data.get("max_length") if isinstance(data.get("max_length"), int) else None
    counts = read_ledger_counts(folder, max_length, packing=data.get("packing") is not False)
    metrics = read_json_object(folder / METRICS_FILE) if (folder / METRICS_FILE).is_file() else {}
    columns = read_columns(metrics)
    leakage, record_audit = read_leakage(folder), read_record_audit(folder)
    sentences = (
        training_sentences(curves, counts),
        test_sentences(columns),
        audit_sentences(leakage, record_audit),
    )
    return Content(
        *_names(folder),
        facts=list(_facts(config, curves, origin)),
        summary=[text for part in sentences if (text := " ".join(part))],
        tiles=list(_tiles(curves, counts, columns)),
        training=list(_training_figures(curves)),
        scalars=[(name, float(value)) for name, value in metrics.items() if name in _SCALARS and _is_number(value)],
        systems=list(columns),
        metrics=metric_rows(columns),
        groups={kind: rows for kind in ("form", "category") if (rows := group_rows(columns, kind))},
        ranked=ranked_samples(folder),
        samples=training_samples(folder),
        counts=counts,
        lengths=list(_length_figures(counts, max_length)),
        max_length=max_length,
        leakage=leakage,
        record_audit=record_audit,
        config=dict(_sections(config)),
        origin=origin,
    )


_SCALARS = ("test/loss", "test/perplexity", "test/token_accuracy")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))


def _names(folder: Path) -> tuple[str, str]:
    """The name of the run, and its version if the folder is one of several."""
    folder = folder.resolve()
    has_version = folder.name.startswith("version_") or folder.name == "base"
    names = (folder.parent.name, folder.name) if has_version else (folder.name, "")
    return redacted(names[0])[0], redacted(names[1])[0]


def _config(folder: Path, statement: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings of the run, of its paths the last part alone, and without identifiers."""
    definition = statement["predicate"].get("buildDefinition", {}) if statement else {}
    known = definition.get("externalParameters") if isinstance(definition, dict) else None
    config = known if isinstance(known, dict) else public_config(read_config(folder / CONFIG_FILE), "")
    redacted_config: dict[str, Any] = redact_tree(config)
    return redacted_config


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _facts(config: Mapping[str, Any], curves: Curves, origin: Origin | None) -> Iterator[tuple[str, str]]:
    """The line below the title."""
    model = _section(config, "model")
    base = (origin.base if origin else "") or model.get("base")
    if base:
        yield "Base", str(base)
    if origin and origin.template:
        yield "Template", origin.template
    if model.get("lora_r"):
        targets = model.get("target_modules")
        on = f" on {', '.join(map(str, targets))}" if isinstance(targets, list) else ""
        yield "LoRA", f"rank {model['lora_r']}, alpha {model.get('lora_alpha')}{on}"
    if origin and origin.device:
        yield "Device", origin.device
    if curves.started:
        yield "Started", curves.started.strftime("%Y-%m-%d %H:%M UTC")


def _tiles(
    curves: Curves, counts: Mapping[str, SplitCounts], columns: Mapping[str, Mapping[str, Interval]]
) -> Iterator[tuple[str, str, str]]:
    """The figures above the fold: name, value and what it is compared with."""
    val, train = curves.get("val/loss"), curves.get("train/loss")
    if val is not None:
        note = f"base {val.values[0]:.3f}" if val.steps[0] == 0 else ""
        yield "Validation loss, lowest", f"{val.values[val.lowest]:.3f}", note
    if train is not None:
        yield "Optimizer steps", f"{train.steps[-1]:,}", f"{len(val)} validations" if val is not None else ""
    if "train" in counts:
        split = counts["train"]
        is_part = split.num_used < len(split.prompt)
        note = f"{split.num_used:,} of them used" if is_part else f"{split.supervised.sum():,} tokens learned"
        yield "Training records", f"{len(split.prompt):,}", note
    for name, title in (("fact recall", "Fact recall"), ("chrF", "chrF")):
        system = next((system for system, rows in columns.items() if name in rows), None)
        if system:
            base = columns.get("base", {}).get(name)
            note = f"base {base.mean:.3f}" if base and system != "base" else ""
            yield f"{title}, {system}", f"{columns[system][name].mean:.3f}", note


def _training_figures(curves: Curves) -> Iterator[Figure]:
    train, val = curves.get("train/loss"), curves.get("val/loss")
    if train is not None or val is not None:
        legend = tuple(name for name, curve in (("train", train), ("validation", val)) if curve is not None)
        caption = "Nats per supervised token: the mean surprise of the model at the reference. Lower is better."
        if val is not None and val.steps[0] == 0:
            caption += " Dotted: the base."
        description = "Loss over optimizer steps."
        if val is not None:
            description += f" Validation: from {val.values[0]:.3f} to {val.values[-1]:.3f}."
        yield Figure("Loss", line_chart("loss", description, train, val), caption, legend)
    accuracy = curves.get("val/token_accuracy")
    if accuracy is not None:
        description = f"Token accuracy in validation: from {accuracy.values[0]:.3f} to {accuracy.values[-1]:.3f}."
        caption = "Fraction of supervised tokens that the model ranks first. Higher is better."
        yield Figure("Token accuracy", line_chart("accuracy", description, None, accuracy), caption, ("", "validation"))


def _length_figures(counts: Mapping[str, SplitCounts], max_length: int | None) -> Iterator[Figure]:
    train = counts.get("train")
    if train is None or not len(train.prompt):
        return
    edges = _edges(0, int(max(train.prompt.max(), train.supervised.max())))
    limit = f"; the limit is {max_length:,}" if max_length else ""
    caption = f"Half of the records have at most {train.median:,.0f} tokens, the longest has {train.longest:,}{limit}."
    drawing = histogram("lengths", "Histogram. " + caption, "tokens", [train.prompt, train.supervised], edges)
    yield Figure("Tokens per training record", drawing, caption, ("prompt", "response"))
    rows = train.row_tokens
    if rows is None or not len(rows) or not max_length:
        return
    fill = float(rows.sum()) / (len(rows) * max_length)
    caption = f"{plural(len(rows), 'row')} of up to {max_length:,} tokens in an epoch, {fill:.1%} full."
    drawing = histogram("rows", "Histogram. " + caption, "tokens", [rows], _edges(0, max_length))
    yield Figure("Tokens per packed row", drawing, caption)


def _edges(low: int, high: int, most: int = 32) -> Any:
    """Edges of at most so many bins of equal, whole width.

    >>> _edges(0, 100, most=10).tolist()
    [0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]
    """
    width = max(1, -(-(high - low) // most))
    return np.arange(low, high + width, width)  # a histogram's last bin has both of its edges


def _sections(config: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """The settings by section; those that are null have no effect and are left out."""
    for section in ("model", "data", "trainer", "checkpoint"):
        values = config.get(section)
        if isinstance(values, dict):
            yield section, [(name, _setting(value)) for name, value in values.items() if value is not None]
    plain = [
        (name, _setting(value)) for name, value in config.items() if not isinstance(value, dict) and value is not None
    ]
    if plain:
        yield "run", plain


def _setting(value: Any) -> str:
    """
    >>> _setting(True), _setting(["Wqkv", "fc1"]), _setting(0.002)
    ('true', 'Wqkv, fc1', '0.002')
    """
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(_setting, value)) if isinstance(value, list) else str(value)
