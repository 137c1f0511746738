"""The subcommand report, and the page that fit and test leave."""

import json
import logging
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pyarrow import parquet
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cli.conftest import fit as fit
from lit_phi2.cli.main import main
from lit_phi2.training.reporting import write_report
from report.conftest import Page

Fit = Callable[..., int]
RUN = Path("runs/small/version_0")


def test_fit_and_test_leave_a_page_of_their_numbers(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    """References: TensorBoard's own reader, the ledger and test_metrics.json."""
    assert fit("--data.packing", "true") == 0
    assert "report: " in capsys.readouterr().err
    page = Page((RUN / "report.html").read_text("utf-8"))
    losses = [event.value for event in EventAccumulator(str(RUN)).Reload().Scalars("val/loss")]
    assert f"from {losses[0]:.3f} (the base)" in " ".join(page.text.split())
    ledger = [row for row in parquet.read_table(RUN / "ledger.parquet").to_pylist() if row["split"] == "train"]
    tokens = sum(row["prompt_tokens"] + row["supervised_tokens"] for row in ledger)
    assert page.row("train")[1:4] == [str(len(ledger)), "0", f"{tokens:,}"]
    assert "Not tested" in page.text
    assert str(Path.cwd()) not in page.text, "no path of this machine"
    assert "Samples during training" in page.text

    test = ["test", "--config", str(RUN / "config.yaml"), "--ckpt_path", "best", "--data.test_files", "records.jsonl"]
    assert main([*test, "--max_completions", "5"]) == 0
    page = Page((RUN / "report.html").read_text("utf-8"))
    metrics = json.loads((RUN / "test_metrics.json").read_text("utf-8"))["completions"]
    for name in ("ROUGE-L", "chrF", "length ratio", "eos_rate"):
        cells = page.row(name)
        for system, cell in (("adapter", cells[1]), ("base", cells[3])):
            mean, low, high = (f"{metrics[system][name][key]:.3f}" for key in ("mean", "low", "high"))
            interval = f" {low} \u2013 {high}" if metrics[system][name]["low"] < metrics[system][name]["high"] else ""
            assert cell == mean + interval, name
    rows = [json.loads(line) for line in (RUN / "test_completions.jsonl").read_text("utf-8").splitlines()]
    records = [json.loads(line) for line in Path("records.jsonl").read_text("utf-8").splitlines()][:5]
    assert [(row["id"], row["reference"]) for row in rows] == [(row["id"], row["response"]) for row in records]
    mean = sum(row["completions"]["adapter"]["chrF"] for row in rows) / 5
    assert mean == pytest.approx(metrics["adapter"]["chrF"]["mean"], abs=1e-4)
    best = max(rows, key=lambda row: row["completions"]["adapter"]["chrF"])
    assert page.text.index(best["id"]) < page.text.index("best 1 of 5")
    assert main([*test, "--max_completions", "0"]) == 0
    assert not (RUN / "test_completions.jsonl").exists(), "those of an earlier test beside new metrics"


def test_report_writes_the_page_again_where_it_is_asked_to(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--trainer.max_steps", "2") == 0
    written = (RUN / "report.html").read_bytes()
    for ckpt_path in (RUN, RUN / "checkpoints" / "last.ckpt", RUN / "adapter"):
        (RUN / "report.html").unlink()
        assert main(["report", "--ckpt_path", str(ckpt_path)]) == 0
        assert (RUN / "report.html").read_bytes() == written, ckpt_path
    arguments = ["report", "--config", "small.yaml", "--ckpt_path", "last"]
    assert main([*arguments, "--output", "pages/a.html"]) == 0
    assert Path("pages/a.html").read_bytes() == written
    capsys.readouterr()
    assert main([*arguments, "--output", "a.pdf"]) == 2
    assert "expected .html" in capsys.readouterr().err
    Path("empty").mkdir()
    assert main(["report", "--ckpt_path", "empty"]) == 2
    assert "nothing of a run" in capsys.readouterr().err
    assert main(["report", "--ckpt_path", "nowhere"]) == 2


def test_a_page_that_fails_loses_no_fit(
    fit: Fit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """matplotlib is missing."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert fit("--trainer.max_steps", "2") == 0
    logged = capsys.readouterr().err
    assert "report: not written" in logged
    assert "matplotlib" in logged
    assert (RUN / "adapter" / "adapter_model.safetensors").is_file()
    assert (RUN / "provenance.json").is_file()
    assert not (RUN / "report.html").exists()


def test_a_full_disk_is_one_line_of_the_log(
    new_run: Callable[..., Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on file size simulates the disk."""
    monkeypatch.setattr(logging.getLogger("lit_phi2"), "propagate", True)  # which the command line turns off
    folder = new_run()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        write_report(RankZero(), folder)  # type: ignore[arg-type]  # what it needs of a Trainer
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (message,) = {record.getMessage() for record in caplog.records}  # a set: other tests leave handlers to the logger
    assert "report: not written" in message
    assert "File too large" in message
    assert not (folder / "report.html").exists()


class RankZero:
    is_global_zero = True


class OtherRank:
    is_global_zero = False


def test_only_rank_0_writes_the_page(tmp_path: Path) -> None:
    write_report(OtherRank(), tmp_path)  # type: ignore[arg-type]  # what it needs of a Trainer
    assert not list(tmp_path.iterdir())
