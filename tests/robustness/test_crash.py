"""A few kills of scripts/crash_test.py, which by itself does a hundred: what comes out is what it would have been."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_run_that_is_killed_over_and_over_ends_in_the_same_bytes() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "crash_test.py"), "--kills", "8", "--each", "1"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *_, last = (line for line in done.stdout.splitlines() if line.startswith("run "))
    assert "equal" in last
    killed = {phase: int(count) for count, phase in re.findall(r"(\d+) in (\w+)", last)}
    assert sum(killed.values()) >= 8
    assert {"step", "window", "validation", "checkpoint", "export", "answers"} <= set(killed)
