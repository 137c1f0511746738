"""Logging to the terminal: what is printed, by which rank, and without which imports."""

import logging
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator

import pytest

from lit_phi2.utils.console import set_up_logging


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
