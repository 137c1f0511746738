"""The command line as a process: its output, and its exit code after a signal."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from forked_acts import Act
from forked_runs import run, start

FIT = [sys.executable, "-m", "lit_phi2", "fit", "--config", "small.yaml"]


def test_output_contains_no_advertising(fit: Callable[..., int]) -> None:
    """Reference: words of the tips and warnings that Lightning and its dependencies print."""
    process = subprocess.run(
        [*FIT, "--trainer.max_steps", "2"], capture_output=True, text=True, timeout=300, check=True
    )
    output = (process.stdout + process.stderr).replace("http://localhost:", "")  # TensorBoard, on this machine
    assert "run folder: " in output, "our own lines are printed"
    for word in ("Tip", "litlogger", "litmodels", "pip install", "Warning", "GPU available", "deprecated", "http"):
        assert word not in output, output


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_exits_with_its_code(
    number: signal.Signals, exit_code: int, fit: Callable[..., int], read_last: Callable[..., dict], tmp_path: Path
) -> None:
    """The message says how to continue."""
    act = Act("training", 5, tmp_path / "sent", number)
    stopped = start(["fit", "--config", "small.yaml"], tmp_path / "log", act=act)
    assert stopped.wait() == exit_code, stopped.output
    assert "Traceback" not in stopped.output
    assert "--ckpt_path runs/small/version_0/checkpoints/last.ckpt" in stopped.output
    assert read_last()["global_step"] == 5


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_output_in_an_encoding_that_lacks_characters(
    encoding: str, fit: Callable[..., int], write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    """inspect prints an example, fit logs the name of its folder; reference: the escapes of Python."""
    records = str(write_jsonl([{"instruction": "5 €", "response": "日本"}] * 2, "euro.jsonl"))
    arguments = ["--config", "small.yaml", "--data.train_files", records, "--data.val_files", records]
    run(["inspect", *arguments], tmp_path / "log", encoding=encoding)
    assert rb"5 \u20ac" in (tmp_path / "log").read_bytes()
    run(["fit", "--config", "small.yaml", "--trainer.max_steps=1", "--run_name=€"], tmp_path / "log", encoding=encoding)
    assert rb"run folder: runs/\u20ac/version_0" in (tmp_path / "log").read_bytes()
