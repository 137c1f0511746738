"""The short form of scripts/crash_test.py: a run that is killed repeatedly ends in the files of an undisturbed run."""

import os
import re
import subprocess
import sys

import pytest

from helpers import ROOT


@pytest.mark.slow
def test_a_run_killed_repeatedly_ends_in_the_same_bytes() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "crash_test.py"), "--kills", "8", "--each", "1", "--threads", "1"]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    *_, last = (line for line in result.stdout.splitlines() if line.startswith("run "))
    assert "equal" in last
    kills = {phase: int(count) for count, phase in re.findall(r"(\d+) in (\w+)", last)}
    assert sum(kills.values()) >= 8
    assert {"step", "window", "validation", "checkpoint", "export", "completions"} <= set(kills)
