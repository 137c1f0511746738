"""Progress of completions: lines in a log file at most every ten seconds, none of quick work, a bar on a terminal."""

import io
import sys
import time

import pytest

from lit_phi2.training.completion_progress import CompletionProgress


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def test_a_line_has_records_speed_and_time_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten tokens a second: 100 in a record. After 30 of 120 records in 300 seconds, 900 are left."""
    progress = CompletionProgress("completed", 120)
    for _ in range(30):
        clock.seconds += 10
        progress.add(100)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 30
    assert lines[-1] == "completed: 30 of 120 records  10 tokens/s  0:15:00 left"


def test_quick_work_prints_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    progress = CompletionProgress("completed", 120)
    for _ in range(120):
        clock.seconds += 0.08
        progress.add(50)
    progress.close()
    assert capsys.readouterr().err == ""
    assert (progress.num_records, progress.num_tokens) == (120, 6000)


def test_lines_are_ten_seconds_apart(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    progress = CompletionProgress("completed", None)
    for _ in range(100):
        clock.seconds += 1
        progress.add(7)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[0] == "completed: 10 records  7 tokens/s"


def test_it_is_off_where_progress_is_off(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    progress = CompletionProgress("completed", 2, enabled=False)
    clock.seconds += 100
    progress.add(1)
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("lit_phi2.training.completion_progress.BAR_DELAY", 0.0)
    progress = CompletionProgress("completed", 4)
    for _ in range(4):
        progress.bar.mininterval = 0
        progress.add(10)
    progress.close()
    assert "completed:  50%" in stream.getvalue()
    assert "2/4 records" in stream.getvalue()
    assert "tokens/s" in stream.getvalue()
