"""scripts/gpu_check: the tiny check measures every part; a part that fails or is too slow does not stop the rest."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from forked_runs import run_script
from gpu_check import run_worker
from gpu_parts.environment import locked_requirements, make_environment
from gpu_parts.settings import PARTS, new_settings
from helpers import ROOT


def run_check(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit code and the report of a tiny check on the CPU."""
    report = folder / "report.json"
    command = [str(ROOT / "scripts" / "gpu_check"), "--tiny", "--device", "cpu", "--output", str(report)]
    command += ["--work_dir", str(folder / "work"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable})
    assert report.is_file(), done.stdout + done.stderr
    return done.returncode, json.loads(report.read_text("utf-8"))


@pytest.mark.slow
def test_the_tiny_check_measures_every_part(tmp_path: Path) -> None:
    """In float32 the completions of both engines are equal, and a resumed run is the uninterrupted one."""
    arguments = ["--tiny", "--device", "cpu", "--output", str(tmp_path / "report.json")]
    check = run_script("gpu_check", [*arguments, "--work_dir", str(tmp_path / "work")], tmp_path / "log")
    assert check.wait() == 0, check.output
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert report["passed"]
    assert report["date"]
    parts = report["parts"]
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(PARTS, "passed")
    assert parts["tests"]["skipped"] >= 10  # there is no CUDA device
    assert parts["tests"]["failed"] == 0
    assert parts["training"]["loss_before"]["lit_phi2"] == pytest.approx(parts["training"]["loss_before"]["hf_trainer"])
    for speeds in (parts["training"]["tokens_per_second"], parts["prediction"]["new_tokens_per_second"]):
        assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in speeds.values())
    assert 0 < parts["training"]["matmul_utilization"]["lit_phi2"] < 1
    assert parts["training"]["peak_gib"]["lit_phi2"] > 0
    assert parts["prediction"]["equal_completions"] == parts["prediction"]["prompts"] == 4
    assert parts["resume"]["float32"]["equal"]
    assert parts["resume"]["bfloat16"]["equal"]
    assert not (tmp_path / "work" / "base").exists()  # gigabytes at the true size


def test_a_part_over_its_limit_does_not_stop_the_rest(tmp_path: Path) -> None:
    code, report = run_check(tmp_path, "--parts", "base,machine", "--limit", "base=0.05", "--limit", "machine=300")
    assert code == 1
    assert not report["passed"]
    assert report["parts"]["base"]["status"] == "timed out"
    assert report["parts"]["machine"]["status"] == "passed"
    assert report["parts"]["machine"]["torch"]


def test_a_failed_part_is_recorded_with_its_log(tmp_path: Path) -> None:
    """Training has no base to load."""
    code, report = run_check(tmp_path, "--parts", "training", "--limit", "training=300")
    assert code == 1
    training = report["parts"]["training"]
    assert training["status"] == "failed"
    assert training["dtype"] == "float32"  # measured before the failure
    assert any("InputError" in line for line in training["log"])


def test_measurements_before_a_failure_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(settings: object) -> Iterator[dict[str, Any]]:
        yield {"first": 1}
        yield {"second": 2}
        raise RuntimeError("the third step failed")

    monkeypatch.setitem(sys.modules, "gpu_parts.machine", SimpleNamespace(measure=measure))
    with pytest.raises(RuntimeError, match="third"):
        run_worker("machine", new_settings(tiny=True, device="cpu", work_dir=tmp_path), tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text()) == {"first": 1, "second": 2}


def test_all_parts_together_take_less_than_8_minutes() -> None:
    assert sum(PARTS.values()) <= 7 * 60  # a minute is left to install wheels


def test_wheels_are_collected_of_all_but_torch() -> None:
    names = {line.partition("==")[0] for line in locked_requirements()}
    assert {"lightning", "transformers", "peft", "datasets", "pytest"} <= names
    assert not {name for name in names if name.startswith(("torch", "nvidia", "triton")) and name != "torchmetrics"}


def test_only_some_packages_are_collected_on_request() -> None:
    assert [line.partition("==")[0] for line in locked_requirements(["PyTorch_Lightning", "peft"])] == [
        "pytorch-lightning",
        "peft",
    ]
    with pytest.raises(SystemExit, match="no-such-package"):
        locked_requirements(["no-such-package"])


def test_the_environment_has_the_wheels_and_this_torch(tmp_path: Path) -> None:
    """Reference: a wheel written by hand, and the place of torch in the interpreter of this test."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_wheel(wheels, "gpu_check_probe", "1.0")
    python = make_environment(wheels, tmp_path / "env")
    program = "import gpu_check_probe, importlib.util as u; print(gpu_check_probe.VALUE, u.find_spec('torch').origin)"
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
    torch_spec = subprocess.run(
        [sys.executable, "-c", "import importlib.util as u; print(u.find_spec('torch').origin)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"7 {torch_spec.stdout}"


def test_a_folder_without_wheels_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"holds no wheels.*scripts/gpu_check --wheels DIR --python-version 3\.\d+"):
        make_environment(tmp_path, tmp_path / "env")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "--tiny"),
        (["--tiny", "--parts", "machine,nothing"], "nothing"),
        (["--tiny", "--limit", "nothing=5"], "nothing"),
        (["--tiny", "--limit", "base=soon"], "base=soon"),
        (["--tiny", "--rows", "3"], "3 does not divide"),
    ],
)
def test_invalid_arguments_are_refused_before_a_part(arguments: list[str], message: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "gpu_check.py"), "--output", str(tmp_path / "report.json")]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "report.json").exists()


def write_wheel(folder: Path, name: str, version: str) -> None:
    """A wheel of one module with VALUE = 7 (PEP 427)."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "VALUE = 7\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
