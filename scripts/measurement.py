"""Measurement: a JSON file of measured numbers, with the commit, date, machine and command that they came from.

    {"kind": "throughput", "commit": ..., "date": ..., "machine": ..., "command": ..., ...}  ->  scripts/plots.py

Only the standard library is imported here.
"""

import datetime
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def write_measurement(file: Path, kind: str, numbers: dict[str, Any], *, device: str = "") -> None:
    """Write numbers with their origin.

    Args:
        file: to replace.
        kind: of those in plots.py; decides how plots.py draws them.
        numbers: JSON values.
        device: name of the GPU; the CPU is named if empty.
    """
    write_json(file, {"kind": kind, **origin(device), **numbers})


def origin(device: str = "") -> dict[str, Any]:
    """Commit, date, machine and command of this process."""
    return {
        "commit": git_commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{device or cpu_name()}, {os.cpu_count()} CPU cores, torch {version('torch')}",
        "command": " ".join(["python", f"scripts/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }


def git_commit() -> str | None:
    """The commit that is checked out, with a plus sign if files differ from it; None where there is no git."""
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Replace the file: a reader finds the old content or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tmp_file = file.with_name(file.name + ".tmp")
    tmp_file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    tmp_file.replace(file)
