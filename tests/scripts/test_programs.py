"""The other programs in scripts/: their examples hold, they start, and their pictures need no network."""

import doctest
import importlib
import runpy
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from helpers import ROOT
from plots import draw
from screenshot import to_svg

ORIGIN = {"commit": "0123abc", "date": "2026-01-01", "machine": "a machine", "command": "a command"}
THROUGHPUT = {
    "kind": "throughput",
    **ORIGIN,
    "peers": {"hf-b8": {"tokens_per_second": [100.0, 110.0], "ours_tokens_per_second": [200.0, 242.0]}},
}
STEP_SIZES = {
    "kind": "step_sizes",
    **ORIGIN,
    "points": [{"rows": rows, "length": 128, "seconds": rows, "gib_above_model": rows} for rows in (1, 2)],
}

LOSSES = {"train/loss": [[1, 2.0], [2, 1.5]], "val/loss": [[0, 2.5], [2, 1.4]]}
INT8 = {"kind": "int8", **ORIGIN, "runs": {"float32": LOSSES, "int8": LOSSES}}
GPU_CHECK = {
    "kind": "gpu_check",
    **ORIGIN,
    "parts": {
        "machine": {"device": "a card", "torch": "2.13"},
        "training": {
            "lengths": {
                "512": {
                    "lit_phi2": {"tokens_per_second": [300.0, 310.0], "speedup": 1.0},
                    "hf_trainer": {"tokens_per_second": [100.0, 110.0], "speedup": 2.9},
                    "matmul_tflops": [1.0],
                }
            }
        },
    },
}
SHARE = {"value": 0.5, "low": 0.2, "high": 0.8}
LEAKAGE = {
    "kind": "leakage",
    **ORIGIN,
    "settings": {"canaries": 8, "records": 40, "epochs": 4, "learning_rate": 0.005},
    "ranks": {
        "4": {
            "canaries": [
                {"place": place, "repeats": repeats, "is_control": not repeats, "exposure": SHARE, "extracted": SHARE}
                for place in ("prompt", "response")
                for repeats in (0, 1, 4, 16)
            ]
        }
    },
}


@pytest.mark.parametrize(
    "name",
    [
        "bench",
        "build_claims",
        "build_tiny_phi",
        "claims.world",
        "gpu_parts.base",
        "gpu_parts.environment",
        "gpu_parts.prediction",
        "gpu_parts.report",
        "gpu_parts.settings",
        "profiles.step",
        "record_audit",
    ],
)
def test_the_examples_in_docstrings_hold(name: str) -> None:
    module: ModuleType = importlib.import_module(name)
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize(
    "program",
    [
        "bench",
        "build_claims",
        "build_claims_prose",
        "build_random_phi2",
        "build_tiny_phi",
        "command_times",
        "crash_test",
        "export_check",
        "export_parity",
        "gpu_check",
        "leakage_curve",
        "memaudit_check",
        "memory_plan_check",
        "plots",
        "profiling",
        "quantization_check",
        "record_audit",
        "screenshot",
        "sweep",
    ],
)
def test_every_program_prints_its_help(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(ROOT / "scripts" / f"{program}.py")
    monkeypatch.setattr(sys, "argv", [path, "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(path, run_name="__main__")
    assert stopped.value.code == 0
    assert f"scripts/{program}" in capsys.readouterr().out  # the command to copy


@pytest.mark.parametrize(
    "measurement", [THROUGHPUT, GPU_CHECK, STEP_SIZES, LEAKAGE, INT8], ids=lambda numbers: numbers["kind"]
)
def test_the_same_numbers_give_the_same_picture(measurement: dict[str, Any], tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        draw(measurement, tmp_path / name)
    first, second = ((tmp_path / name).read_bytes() for name in ("a.svg", "b.svg"))
    assert first == second
    assert ET.fromstring(first).tag.endswith("svg")


def test_a_peers_ratio_is_the_median_over_its_rounds(tmp_path: Path) -> None:
    """200 / 100 and 242 / 110: 2.0 and 2.2."""
    draw(THROUGHPUT, tmp_path / "bars.svg")
    assert "lit_phi2 is 2.10 times as fast" in (tmp_path / "bars.svg").read_text("utf-8")


def test_an_unknown_kind_of_measurement_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="kind 'pie'"):
        draw({"kind": "pie"}, tmp_path / "pie.svg")


def test_the_terminal_picture_loads_nothing() -> None:
    svg = to_svg([("python -m lit_phi2 fit", "step 1  val/loss 0.5\n")])
    assert "@font-face" not in svg
    assert "url(http" not in svg
    text = "".join(ET.fromstring(svg).itertext()).replace("\xa0", " ")
    assert "python -m lit_phi2 fit" in text
    assert "val/loss 0.5" in text
