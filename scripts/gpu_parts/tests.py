"""Tests: the tests that are marked for this device, counted from pytest's own report.

files that name the marker -> pytest -m cuda --junitxml -> passed, failed, skipped, names of the failed
"""

import importlib.util
import os
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpu_parts.settings import Settings

ROOT = Path(__file__).resolve().parents[2]


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """Run them.

    Raises:
        SystemExit: a test failed, or no test ran on a GPU.
    """
    marker = "mps" if settings.device == "mps" else "cuda"
    junit_file = settings.work_path / "junit.xml"
    junit_file.unlink(missing_ok=True)
    arguments = ["-q", "-m", marker, "-p", "no:cacheprovider", f"--junitxml={junit_file}"]
    arguments += ["-n", "0"] if importlib.util.find_spec("xdist") else []
    os.chdir(ROOT)
    code = pytest.main([*arguments, *files_that_name(marker)])
    counts = count_outcomes(junit_file)
    counts["summary"] = f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped"
    yield counts
    if code:
        raise SystemExit(f"pytest ended with {code}")
    if settings.device != "cpu" and not counts["passed"]:
        raise SystemExit(f"no test marked {marker} ran")


def files_that_name(marker: str) -> list[str]:
    """Test files with this marker, by its name or in the list of devices that tests share; the others take long."""
    texts = {path: path.read_text("utf-8") for path in sorted((ROOT / "tests").rglob("test_*.py"))}
    return [
        str(path.relative_to(ROOT)) for path, text in texts.items() if f"mark.{marker}" in text or "DEVICES" in text
    ]


def count_outcomes(junit_file: Path) -> dict[str, Any]:
    """The numbers of a JUnit file, and the tests that failed."""
    cases = list(ET.parse(junit_file).getroot().iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "passed": len(cases) - len(failed) - skipped,
        "failed": len(failed),
        "skipped": skipped,
        "failed_tests": [f"{case.get('classname')}::{case.get('name')}" for case in failed],
    }
