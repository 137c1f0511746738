"""The command line as a process: its output, and its exit code after a signal."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

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
    number: signal.Signals, exit_code: int, fit: Callable[..., int], read_last: Callable[..., dict]
) -> None:
    """The message says how to continue."""
    command = [*FIT, "--trainer.max_epochs", "2000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    samples = Path("runs/small/version_0/samples.jsonl")
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not (samples.is_file() and '"step": 12' in samples.read_text()):
        time.sleep(0.1)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == exit_code, errors
    assert "Traceback" not in errors
    assert "--ckpt_path runs/small/version_0/checkpoints/last.ckpt" in errors
    assert read_last()["global_step"] >= 12


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_output_in_an_encoding_that_lacks_characters(
    encoding: str, fit: Callable[..., int], write_jsonl: Callable[..., Path]
) -> None:
    """inspect prints an example, fit logs the name of its folder; reference: the escapes of Python."""
    records = str(write_jsonl([{"instruction": "5 €", "response": "日本"}] * 2, "euro.jsonl"))
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    arguments = ["--config", "small.yaml", "--data.train_files", records, "--data.val_files", records]
    command = [sys.executable, "-m", "lit_phi2", "inspect", *arguments]
    process = subprocess.run(command, env=environment, capture_output=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert rb"5 \u20ac" in process.stdout
    command = [*FIT, "--trainer.max_steps", "1", "--run_name", "€"]
    process = subprocess.run(command, env=environment, capture_output=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert rb"run folder: runs/\u20ac/version_0" in process.stderr
