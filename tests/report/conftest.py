"""Fixtures of the report's tests: the folder of a run with numbers written by hand, and a page taken apart."""

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from pyarrow import parquet
from torch.utils.tensorboard import SummaryWriter

from lit_phi2.report.page import write_report

SCALARS = {
    "train/loss": {1: 3.0, 2: 2.5, 3: 2.25, 4: 2.0},
    "val/loss": {0: 4.125, 2: 2.5, 4: 2.75},
    "val/token_accuracy": {0: 0.25, 2: 0.5, 4: 0.5},
}
# prompt and supervised tokens of each record: rows of at most 8 tokens are 5 + 3 and 4 + 2
LEDGER = [("train", 1, 2), ("train", 3, 2), ("train", 1, 1), ("train", 2, 2), ("val", 2, 2)]
INTERVALS = {
    "adapter": {"fact recall": (0.75, 0.625, 0.875), "chrF": (0.5, 0.375, 0.5625), "length ratio": (1.5, 1.25, 1.75)},
    "base": {"fact recall": (0.125, 0.0625, 0.25), "chrF": (0.25, 0.1875, 0.3125), "length ratio": (2.0, 2.0, 2.0)},
}
DIGEST = "0123456789abcdef" * 4


class Page(HTMLParser):
    """A page taken apart by the standard library.

    Attributes:
        tags: name and attributes of each element.
        tables: rows of cells, as text.
        text: all text outside <style>.
        style: the text of <style> and of every style attribute.
    """

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = self.style = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.style += f"{dict(attrs).get('style', '')};"
        if tag not in ("meta", "br", "path", "circle", "use"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "br", "path", "circle", "use"):
            assert self.open.pop() == tag, "elements are nested"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.style += data
            return
        self.text += data
        if "td" in self.open or ("th" in self.open and "table" in self.open):
            self.tables[-1][-1][-1] += data

    def row(self, start: str) -> list[str]:
        """The cells of the row with this first cell, or the only one that begins so; white space normalized."""
        rows = [row for table in self.tables for row in table if row and row[0].strip().startswith(start)]
        rows = [row for row in rows if row[0].strip() == start] or rows
        assert len(rows) == 1, f"{len(rows)} rows begin with {start}"
        return [" ".join(cell.split()) for cell in rows[0]]


@pytest.fixture
def page_of(tmp_path: Path) -> Callable[[Path], Page]:
    """Writes the page of a folder, and takes it apart."""

    def read(folder: Path) -> Page:
        write_report(folder, tmp_path / "page.html")
        return Page((tmp_path / "page.html").read_text("utf-8"))

    return read


@pytest.fixture
def new_run(tmp_path: Path) -> Callable[..., Path]:
    """Makes the folder of a run in which every text of a record, a file or a person is given by its place."""

    def make(say: Callable[[str], str] = str, name: str = "claims") -> Path:
        folder = tmp_path / name / "version_3"
        folder.mkdir(parents=True)
        write_config(folder, say)
        write_events(folder)
        write_ledger(folder, say)
        write_test(folder, say)
        write_samples(folder, say)
        write_audits(folder, say)
        write_provenance(folder, say)
        return folder

    return make


def write_config(folder: Path, say: Callable[[str], str]) -> None:
    data = {"max_length": 8, "packing": True, "train_files": [f"/home/ann/{say('file name')}.jsonl"]}
    model = {"base": "tiny", "lora_r": 2, "lora_alpha": 4, "target_modules": ["Wqkv", "fc1"], "dtype": None}
    config = {"seed_everything": 42, "run_name": say("run name"), "model": model, "data": data}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), "utf-8")


def write_events(folder: Path) -> None:
    with SummaryWriter(str(folder)) as writer:
        for name, values in SCALARS.items():
            for step, value in values.items():
                writer.add_scalar(name, value, step)


def write_ledger(folder: Path, say: Callable[[str], str]) -> None:
    rows: list[dict[str, Any]] = [
        {"split": split, "prompt_tokens": prompt, "supervised_tokens": supervised, "truncated_tokens": 0}
        | {"uses": [{"epoch": 0, "step": 1}] if split == "train" else [], "left_out": None, "id": "in the ledger alone"}
        for split, prompt, supervised in LEDGER
    ]
    rows += [{"split": "train", "uses": [], "left_out": say("reason").replace("\ud83d", "")} for _ in range(2)]
    counts = [(f"{name}_tokens", pa.int32()) for name in ("prompt", "supervised", "truncated")]
    uses = pa.list_(pa.struct([("epoch", pa.int32()), ("step", pa.int64())]))
    texts = [(name, pa.string()) for name in ("split", "left_out", "id")]
    schema = pa.schema([*texts, *counts, ("uses", uses)])
    parquet.write_table(pa.Table.from_pylist(rows, schema), folder / "ledger.parquet")


def write_test(folder: Path, say: Callable[[str], str]) -> None:
    def interval(values: tuple[float, float, float]) -> dict[str, float]:
        return dict(zip(("mean", "low", "high"), values, strict=True)) | {"records": 8}

    columns = {system: {name: interval(values) for name, values in rows.items()} for system, rows in INTERVALS.items()}
    form, category = f"form {say('form')}", f"category {say('category')}"
    for name in (form, category, f"{category}: chrF", f"facts {say('kind')}"):
        columns["adapter"][name] = interval((0.4375, 0.40625, 0.46875))
    content = {"test/loss": 1.625, "completions": columns}
    (folder / "test_metrics.json").write_text(json.dumps(content), "utf-8")
    lines = []
    for number in range(8):
        completions = {
            system: {"completion": f"{say(system)} {system}-{number}.", "finish_reason": "stop", "chrF": score}
            for system, score in (("adapter", number / 8), ("base", 0.1))
        }
        row = {"id": say(f"id {number}"), "instruction": say("instruction"), "input": say("input")}
        lines.append(json.dumps({**row, "reference": say("reference"), "completions": completions}) + "\n")
    (folder / "test_completions.jsonl").write_text("".join(lines), "utf-8")


def write_samples(folder: Path, say: Callable[[str], str]) -> None:
    lines = [
        {"step": step, "id": say("sample id"), "prompt": say("sample prompt"), "reference": say("sample reference")}
        | {"completion": f"{say('sample completion')} at step {step}", "finish_reason": "stop"}
        for step in (0, 2, 4)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


def write_audits(folder: Path, say: Callable[[str], str]) -> None:
    membership = {"auc": {"value": 0.5625, "low": 0.5, "high": 0.625}}
    canaries = {say("canary"): {"exposure": 12.5}, "extracted": [say("prefix")]}
    leakage = {"membership": membership, "canaries": canaries, "max_auc": 0.6, "passed": True}
    (folder / "audit_leakage.json").write_text(json.dumps(leakage), "utf-8")
    lines = [
        {"kind": kind, "location": f"/home/ann/{say('audited file')}.jsonl:{number}", "id": say("audited id")}
        for kind, count in (("memorised", 3), ("near_duplicate", 1), (say("kind of finding"), 1))
        for number in range(count)
    ]
    (folder / "audit_records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


def write_provenance(folder: Path, say: Callable[[str], str]) -> None:
    dependencies = [
        {"name": "base", "uri": say("base"), "digest": {"lit_phi2_base": DIGEST}},
        {"name": "template", "digest": {"lit_phi2_template": "aa"}, "annotations": {"version": 1}},
    ]
    environment = {"environment": {"device": say("device")}}
    definition = {"resolvedDependencies": dependencies, "internalParameters": environment}
    predicate = {
        "buildDefinition": definition,
        "runDetails": {"builder": {"version": {"torch": say("version"), "code": DIGEST}}},
        "forgotten": {"salted_ids": ["00", "11"], "replaces": {"run": say("replaced")}},
    }
    subject = [{"name": say("subject"), "digest": {"sha256": DIGEST[::-1]}}]
    statement = {"predicateType": "urn:lit_phi2:provenance:v1", "subject": subject, "predicate": predicate}
    (folder / "provenance.json").write_text(json.dumps(statement), "utf-8")
