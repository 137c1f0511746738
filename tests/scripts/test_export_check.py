"""The program that measures exports at true size: on small programs in the place of an export, and its own command."""

import subprocess
import sys
from pathlib import Path

import pytest

from export.support import random_adapter
from export_check import Export, Peak, export_command, fill_disk, kill_repeatedly, measure, table
from lit_phi2.adapters.peft_format import save_adapter
from lit_phi2.cli.main import main
from lit_phi2.model.lora import LoraSettings
from lit_phi2.pretrained import resolve_base_model

START = "import pathlib, shutil, sys, time\nout = pathlib.Path(sys.argv[-1])\n"
WRITE = """
aside = out.with_name(f".{out.name}.export")
shutil.rmtree(aside, ignore_errors=True)
aside.mkdir()
(aside / "model").write_bytes(bytes(200_000))
"""
WAIT_TWICE = """
runs = out.with_name("runs")
with runs.open("a") as file:
    file.write("x")
time.sleep(600 if len(runs.read_text()) <= 2 else 0)
"""
RENAME = """
(aside / "export.json").write_text('{"check": {"method": "none"}}')
shutil.rmtree(out, ignore_errors=True)
aside.rename(out)
"""
FILL = "try:\n    out.write_bytes(bytes(200_000))\nexcept OSError as error:\n    print(error)\n"
UNDISTURBED = {"size_gb": 200_000 / 1e9, "largest_file_gb": 200_000 / 1e9}


def program(code: str, folder: Path) -> Export:
    return Export("merged", 0, [sys.executable, "-c", START + code], folder / "out")


def test_an_export_is_measured_and_removed(tmp_path: Path) -> None:
    row = measure(program(WRITE + RENAME, tmp_path))
    assert row["size_gb"] == pytest.approx(200_000 / 1e9, rel=0.01)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
    assert table([row]).splitlines()[-1].startswith("| merged | 0 | ")


def test_the_memory_of_child_processes_counts() -> None:
    """A process with 64 MB, started by one that has few; nothing once they have ended."""
    child = "x = bytearray(b'x' * 64_000_000); print(flush=True); input()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    peak = Peak()
    peak.sample(process.pid)
    process.communicate(b"\n")
    assert 64_000_000 < peak.anonymous < 128_000_000
    assert peak.resident > peak.anonymous
    after = Peak()
    after.sample(process.pid)
    assert (after.anonymous, after.resident) == (0, 0)


def test_kills_of_a_right_export_find_nothing(tmp_path: Path) -> None:
    points = kill_repeatedly(program(WRITE + WAIT_TWICE + RENAME, tmp_path), UNDISTURBED, 2)
    assert [point["earlier_export"] for point in points] == [False, True]
    assert [point["bytes_written"] for point in points] == [200_000, 200_000]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        pytest.param("out.mkdir()\n(out / 'model').touch()\n", r"it left \['model'\]", id="writes in place"),
        pytest.param("shutil.rmtree(out, ignore_errors=True)\n", r"it left \[\]", id="loses the earlier one"),
    ],
)
def test_kills_of_a_wrong_export_are_told(code: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        kill_repeatedly(program(code + WRITE + WAIT_TWICE + RENAME, tmp_path), UNDISTURBED, 2)


def test_a_full_disk_must_leave_nothing(tmp_path: Path) -> None:
    full_disk = fill_disk(program(f"{FILL}    out.unlink()\n    sys.exit(1)", tmp_path), UNDISTURBED)
    assert full_disk["exit_code"] == 1
    assert "File too large" in full_disk["message"]
    with pytest.raises(SystemExit, match=r"left \['out'\]"):
        fill_disk(program(f"{FILL}    sys.exit(1)", tmp_path), UNDISTURBED)


def test_its_command_is_one_that_exports(tmp_path: Path) -> None:
    settings = LoraSettings(2, 4, ("fc1",))
    save_adapter(random_adapter(resolve_base_model("tiny"), settings), tmp_path / "adapter")
    argv = export_command("tiny", tmp_path / "adapter", "merged:float32", 0)
    assert main([*argv[3:], "--output_dir", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
