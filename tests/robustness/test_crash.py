"""The short form of scripts/crash_test.py: a run that is killed repeatedly ends in the files of an undisturbed run."""

import re
from pathlib import Path

import pytest

from forked_runs import run_script


@pytest.mark.slow
def test_a_run_killed_repeatedly_ends_in_the_same_bytes(claims_phi_dir: Path, tmp_path: Path) -> None:
    """In every phase once; where in the phase, the seed says."""
    arguments = ["--kills", "0", "--each", "1", "--seed", "1560", "--threads", "1", "--base", str(claims_phi_dir)]
    result = run_script("crash_test", arguments, tmp_path / "log")
    assert result.wait() == 0, result.output
    *_, last = (line for line in result.output.splitlines() if line.startswith("run "))
    assert "equal" in last
    kills = {phase: int(count) for count, phase in re.findall(r"(\d+) in (\w+)", last)}
    phases = ("step", "window", "validation", "checkpoint", "ledger", "export", "completions", "predictions")
    assert kills == dict.fromkeys(phases, 1)
