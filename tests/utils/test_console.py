"""Logging to the terminal: what is printed, by which rank, and without which imports."""

import io
import logging
import shlex
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from lit_phi2.training.callbacks.checkpoint import stop_message
from lit_phi2.utils.console import print_text, set_up_logging, shell_command


@pytest.fixture(autouse=True)
def _restore_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """set_up_logging is for a process of its own."""
    logger = logging.getLogger("lit_phi2")
    before = logger.handlers[:], logger.level, logger.propagate
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    with warnings.catch_warnings():
        yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.mark.parametrize(("rank", "printed"), [(0, "first\nsecond\n"), (1, "second\n")])
def test_only_rank_0_logs_below_error(rank: int, printed: str, capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(rank)
    logging.getLogger("lit_phi2.data").info("first")
    logging.getLogger("lit_phi2.data").error("second")
    assert capsys.readouterr().err == printed


def test_log_records_are_printed_without_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(rank=0)
    logging.getLogger("lit_phi2.data").info("title \x1b]0;x\x07 end")
    assert capsys.readouterr().err == "title \\x1b]0;x\\x07 end\n"


def test_console_imports_neither_lightning_nor_torch() -> None:
    program = "import lit_phi2.utils.console, sys; print(*sys.modules)"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    packages = {name.partition(".")[0] for name in process.stdout.split()}
    assert "lit_phi2" in packages
    assert not packages & {"torch", "lightning"}


@pytest.mark.parametrize(("encoding", "written"), [("latin-1", "caf\xe9 5 \\u20ac"), ("ascii", "caf\\xe9 5 \\u20ac")])
def test_text_is_printed_in_any_encoding(encoding: str, written: str) -> None:
    """Python use prints so, without the command line's setting for stdout."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    print_text("café 5 €\x07", stream)
    assert stream.buffer.getvalue().decode(encoding) == f"{written}\\x07\n"


def test_log_records_are_printed_in_any_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), "latin-1")
    monkeypatch.setattr(sys, "stderr", stream)
    set_up_logging(rank=0)
    logging.getLogger("lit_phi2.data").info("5 €")
    stream.flush()
    assert stream.buffer.getvalue() == b"5 \\u20ac\n"


ARGUMENTS = ["python", "--config", "my runs/it's $HOME.yaml", "a&b", ""]


def test_a_shell_command_can_be_pasted() -> None:
    """Reference: a shell, which prints the arguments that it gets."""
    command = shell_command("printf", "%s\\n", *ARGUMENTS)
    printed = subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout
    assert printed.split("\n")[:-1] == ARGUMENTS


def test_a_shell_command_on_windows_has_double_quotes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: written by hand, by the rules of CommandLineToArgvW."""
    monkeypatch.setattr(sys, "platform", "win32")
    command = shell_command("python", "--config", r"C:\my runs\config.yaml", 'a "b"')
    assert command == r'python --config "C:\my runs\config.yaml" "a \"b\""'


def test_the_line_to_continue_a_run_can_be_pasted() -> None:
    """Reference: shlex reads it back."""
    run = Path("my runs", "it's mine", "version_0")
    line = stop_message(12, run / "checkpoints" / "last.ckpt").splitlines()[-1]
    expected = ["python", "-m", "lit_phi2", "fit", "--config", str(run / "config.yaml"), "--ckpt_path"]
    assert shlex.split(line) == [*expected, str(run / "checkpoints" / "last.ckpt")]
