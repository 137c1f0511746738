"""scripts/gpu_check: the tiny check measures every part; a part that fails or is too slow does not stop the rest."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from forked_runs import run_script
from gpu_check import run_worker
from gpu_parts.base import fitting_layers
from gpu_parts.contenders import Arena, Contender
from gpu_parts.environment import locked_requirements, make_environment
from gpu_parts.report import markdown
from gpu_parts.settings import MINUTES, PARTS, new_settings
from gpu_parts.training import check_results
from helpers import ROOT
from peers.registry import PEERS


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
    """In float32 the completions of both engines are equal, a resumed run is the uninterrupted one, and two processes
    take the steps of one."""
    arguments = ["--tiny", "--device", "cpu", "--minutes", "600", "--output", str(tmp_path / "report.json")]
    check = run_script("gpu_check", [*arguments, "--work_dir", str(tmp_path / "work")], tmp_path / "log")
    assert check.wait() == 0, check.output
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert report["passed"]
    assert report["date"]
    parts = report["parts"]
    assert list(parts) == list(PARTS)
    there = {name: part["status"] for name, part in parts.items() if "not_there" not in part}
    assert there == dict.fromkeys(there, "passed")
    assert there.keys() >= PARTS.keys() - {"int8", "float16"}
    assert parts["tests"]["skipped"] >= 10  # there is no CUDA device
    assert parts["tests"]["failed"] == 0
    assert parts["prediction"]["equal_completions"] == parts["prediction"]["prompts"] == 4
    assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in parts["prediction"]["new_tokens_per_second"].values())
    assert parts["processes"]["gloo"]["gradient_difference"] < 1e-5
    assert parts["resume"]["float32"]["equal"]
    assert parts["resume"]["bfloat16"]["equal"]
    check_training(parts["training"])
    assert "| training | 64 | lit_phi2 |" in check.output
    assert not (tmp_path / "work" / "base").exists()  # gigabytes at the true size


def check_training(training: dict[str, Any]) -> None:
    """Both peers compute the same, on rows of both lengths; what is there has its memory plan and its profile."""
    assert list(training["lengths"]) == ["32", "64"]
    for results in training["lengths"].values():
        ours, theirs = results["lit_phi2"], results["hf_trainer"]
        assert ours["loss_before"] == pytest.approx(theirs["loss_before"], rel=1e-5)
        for result in (ours, theirs):
            assert len(result["tokens_per_second"]) == 2
            assert 0 < result["matmul_share"] < 1
            assert result["peak_gib"] > 0
        assert theirs["speedup"] > 0
        assert ours["planned_gib"] > 0
    assert "not_measured" in training
    assert training["profile"]["ms_by_kind"]["matmul"] > 0
    assert training["blocks"]["torch_ms"] > 0
    assert training["blocks"]["compiled_ms"] > 0
    assert training["blocks"]["logits_mib"] == 64


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


def test_parts_without_time_left_are_named_and_not_run(tmp_path: Path) -> None:
    code, report = run_check(tmp_path, "--parts", "machine,base", "--minutes", "0.1")
    assert code == 1
    assert {name: part["status"] for name, part in report["parts"].items()} == {"machine": "not run", "base": "not run"}
    assert report["seconds"] < 6


def test_the_most_valuable_parts_come_first() -> None:
    """What comes before prediction fits into the minutes even if every part takes its whole limit."""
    names = list(PARTS)
    assert names[:3] == ["machine", "base", "training"]
    assert sum(PARTS[name] for name in names[: names.index("float16")]) <= 60 * MINUTES


def test_a_smaller_card_gets_a_base_of_fewer_layers() -> None:
    """Reference: Phi-2 in 16 bits has 5.56 GB, and a block of it 157 MB."""
    assert fitting_layers(80e9) > fitting_layers(16e9) >= 32
    assert fitting_layers(6e9) * 157e6 + 0.52e9 + 3e9 <= 6e9


def test_micro_batches_grow_until_one_is_slower_or_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: speeds by number of rows, where None does not fit."""
    settings = replace(new_settings(tiny=True, device="cpu", work_dir=tmp_path), batch_tokens=(128, 256, 512, 1024))
    for speeds, expected in (
        ({4: 10.0, 8: 12.0, 16: 11.0, 32: 50.0}, 8),
        ({4: 10.0, 8: 12.0, 16: 14.0, 32: None}, 16),
        ({4: None, 2: None, 1: 3.0}, 1),
        ({4: 10.0, 8: 12.0, 16: 14.0, 32: 15.0}, 32),
    ):
        arena = object.__new__(Arena)
        arena.settings = settings
        loaded: list[int] = []
        monkeypatch.setattr(Arena, "try_batch", lambda self, c, length, rows, variant, speeds=speeds: speeds[rows])
        monkeypatch.setattr(
            Arena, "load", lambda self, c, length, rows, variant, tokens, loaded=loaded: loaded.append(rows)
        )
        arena.choose_batch(Contender(PEERS["ours"], "float32"), 32)
        assert loaded == [expected]


def test_the_report_is_a_table_of_what_was_measured() -> None:
    """Reference: medians and ratios by hand."""
    ours = {"tokens_per_second": [30.0, 10.0, 20.0], "rows": 8, "variant": "", "matmul_share": 0.456, "peak_gib": 9.96}
    ours |= {"planned_gib": 10.458, "plan_deviation": 0.05, "speedup": 1.0}
    theirs = {"tokens_per_second": [5.0], "rows": 4, "variant": "autocast", "matmul_share": 0.1, "peak_gib": 20.0}
    lengths = {"512": {"lit_phi2": ours, "hf_trainer": theirs | {"speedup": 4.0}, "litgpt": {"failed": "no"}}}
    blocks = {"rows": 8, "length": 512, "torch_ms": 12.0, "logits_mib": 1280.0, "vocab_chunk": 25600}
    parts = {
        "training": {
            "status": "passed",
            "seconds": 9.6,
            "lengths": lengths,
            "summary": "a | b",
            "blocks": blocks | {"compiled_ms": 11.0},
        },
        "int8": {"status": "not there", "seconds": 1.0, "blocks": blocks | {"compile_error": "no | triton"}},
    }
    report = {"date": "today", "commit": "abc", "command": "scripts/gpu_check", "seconds": 11.0, "parts": parts}
    lines = markdown(report).splitlines()
    assert "| training | 512 | lit_phi2 | 8 | 20 | 0.46 | 10.0 | 10.5 (+5%) | 1.00 |" in lines
    assert "| training | 512 | hf_trainer (autocast) | 4 | 5 | 0.10 | 20.0 | - | 4.00 |" in lines
    assert "| training | passed, 10 s | a / b |" in lines
    assert "| int8 | not there, 1 s |  |" in lines
    assert not any("litgpt" in line for line in lines)
    block = "a block over 8 rows of 512 tokens, forward and backward: 12.00 ms, compiled"
    chunk = "Loss: 25,600 tokens of the vocabulary a chunk, 1,280 MiB."
    assert f"training: {block} 11.00 ms. {chunk}" in lines
    assert f"int8: {block} no / triton. {chunk}" in lines


def test_contenders_that_fail_or_differ_fail_the_part() -> None:
    equal = {"lit_phi2": {"loss_before": 10.0}, "hf_trainer": {"loss_before": 10.1}, "matmul_tflops": [1.0]}
    check_results(equal, tolerance=0.02)
    for loss in (10.3, float("nan")):
        with pytest.raises(SystemExit, match="differ"):
            check_results(equal | {"hf_trainer": {"loss_before": loss}}, tolerance=0.02)
    for deviation in (-0.11, 0.2):
        with pytest.raises(SystemExit, match="10% off"):
            check_results({"lit_phi2": {"loss_before": 10.0, "plan_deviation": deviation}}, tolerance=0.02)
    check_results({"lit_phi2": {"loss_before": 10.0, "plan_deviation": 0.09}}, tolerance=0.02)
    with pytest.raises(SystemExit, match=r"failed.*out of memory"):
        check_results(equal | {"litgpt": {"failed": "out of memory"}}, tolerance=0.02)


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
