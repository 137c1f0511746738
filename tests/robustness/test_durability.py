"""Checkpoints as often as configured, complete files on a full disk, and predictions that continue after a kill."""

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import ROOT, digest_of_tensors, new_data, new_module, new_trainer
from lit_phi2.adapters.checkpoint import read_checkpoint
from lit_phi2.cli.main import main
from lit_phi2.training.callbacks.checkpoint import AtomicCheckpointIO
from lit_phi2.training.callbacks.predictions import PredictionWriter
from lit_phi2.training.module import LitPhi2
from lit_phi2.utils.files import atomic_write
from lit_phi2.utils.paths import create_run_dir


@pytest.fixture
def arguments(phi_dir: Path, record_rows: list[dict[str, str]], write_jsonl: Callable[..., Path]) -> list[str]:
    """Arguments of any subcommand: twelve records on the small base."""
    file = write_jsonl(list(record_rows))
    files = [f"--data.{split_name}_files={file}" for split_name in ("train", "val", "predict")]
    settings = {
        "run_name": "small",
        "model.base": phi_dir,
        "model.max_new_tokens": 4,
        "model.dtype": "float32",
        "data.max_length": 128,
        "trainer.default_root_dir": file.parent / "runs",
        "trainer.max_epochs": 1,
        "trainer.enable_progress_bar": "false",
    }
    return [*files, *(f"--{key}={value}" for key, value in settings.items())]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"checkpoint_every_n_steps": 2}, [2, 4, 6]),
        ({"checkpoint_every_minutes": 1e-9}, [1, 2, 3, 4, 5, 6]),
        ({"checkpoint_every_minutes": 60.0}, [6]),
        ({}, [6]),
    ],
)
def test_checkpoints_are_as_frequent_as_set_and_at_the_end(
    settings: dict[str, Any],
    expected: list[int],
    phi_dir: Path,
    record_rows: list[dict[str, str]],
    write_jsonl: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twelve rows in accumulation windows of two are six steps; validation and epoch end write the last."""
    steps: list[int] = []
    save = AtomicCheckpointIO.save_checkpoint

    def record_step(
        self: AtomicCheckpointIO, checkpoint: dict[str, Any], path: Path, storage_options: Any = None
    ) -> None:
        steps.append(checkpoint["global_step"])
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", record_step)
    trainer = new_trainer(tmp_path, keep=True, accumulate_grad_batches=2)
    for name, value in settings.items():
        setattr(trainer, name, value)
    trainer.fit(new_module(phi_dir), new_data(phi_dir, write_jsonl(list(record_rows)), packing=False))
    assert sorted(set(steps)) == expected


@pytest.mark.parametrize("key", ["every_n_steps", "every_minutes"])
def test_a_checkpoint_interval_of_zero_is_refused(
    key: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *arguments, f"--checkpoint.{key}=0"]) == 2
    assert f"checkpoint.{key}: 0" in capsys.readouterr().err


def test_a_validation_due_inside_a_window_waits_for_its_end(
    phi_dir: Path, record_rows: list[dict[str, str]], write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    """Twelve micro-batches in accumulation windows of three, a validation due after 2, 4, 6, ...: one at each end."""
    validations: list[tuple[int, int]] = []

    class Module(LitPhi2):
        def on_validation_epoch_end(self) -> None:
            super().on_validation_epoch_end()
            ready = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
            validations.append((self.trainer.global_step, ready))

    module = new_module(phi_dir)
    module.__class__ = Module
    trainer = new_trainer(tmp_path, keep=True, accumulate_grad_batches=3, val_check_interval=2)
    trainer.fit(module, new_data(phi_dir, write_jsonl(list(record_rows)), packing=False))
    assert validations == [(1, 3), (2, 6), (3, 9), (4, 12)]


def test_atomic_write_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    file = tmp_path / "metrics.json"
    atomic_write(file, "old")

    def fail_halfway() -> Any:
        yield "new, but"
        raise OSError(28, "No space left on device", "somewhere")

    with pytest.raises(OSError, match=r"No space left on device: .*metrics\.json"):
        atomic_write(file, fail_halfway())
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"], "the incomplete file is removed"


def test_a_full_disk_ends_fit_with_one_line_and_a_whole_ckpt(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit on file size simulates the disk: one byte less than each file of an undisturbed run."""
    settings = [*arguments, "--data.packing=false", "--checkpoint.every_n_steps=2"]
    assert main(["fit", *settings]) == 0
    whole = tmp_path / "runs" / "small" / "version_0"
    written = [path for path in whole.rglob("*") if path.is_file() and path.name != "report.html"]  # which may fail
    sizes = {path.stat().st_size: path.name for path in written}
    assert len(sizes) >= 6
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size, name in sorted(sizes.items()):
        capsys.readouterr()
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, hard))
        try:
            code = main(["fit", *settings])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        stderr = capsys.readouterr().err
        assert (code, "Traceback" in stderr) == (1, False), (name, stderr)
        assert "File too large" in stderr, (name, stderr)
        newest = max((tmp_path / "runs" / "small").iterdir(), key=lambda run: int(run.name.rpartition("_")[2]))
        for checkpoint in (newest / "checkpoints").glob("*"):
            assert checkpoint.suffix == ".ckpt", "an incomplete file is left"
            read_checkpoint(checkpoint)
        if (newest / "checkpoints" / "last.ckpt").is_file():  # with space on the disk, the run resumes
            assert main(["fit", *settings, "--ckpt_path", "last"]) == 0
            final, expected = (run / "adapter" / "adapter_model.safetensors" for run in (newest, whole))
            assert digest_of_tensors(final) == digest_of_tensors(expected)


def test_a_folder_without_write_permission_is_one_error_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write every folder, so the test makes mkdir fail as the system does for other users."""
    mkdir = Path.mkdir

    def refuse(path: Path, *args: Any, **settings: Any) -> None:
        if path.is_relative_to(tmp_path / "runs"):
            raise PermissionError(13, "Permission denied", str(tmp_path / "runs"))
        mkdir(path, *args, **settings)

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert main(["fit", *arguments]) == 1
    stderr = capsys.readouterr().err
    assert f"error: {tmp_path / 'runs'}: Permission denied" in stderr
    assert "Traceback" not in stderr


def die_after(count: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Kill predict when one more completion than `count` has ended; returns the indices that are written."""
    append = PredictionWriter.append
    ended: list[int] = []

    def append_or_die(self: PredictionWriter, part: Path, output: dict[str, Any]) -> None:
        if len(ended) == count:
            raise KeyboardInterrupt
        ended.append(output["index"])
        append(self, part, output)

    monkeypatch.setattr(PredictionWriter, "append", append_or_die)
    return ended


def test_a_killed_predict_continues_with_the_same_completions(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every completion that ended is kept, but the one whose line was cut short."""
    out = tmp_path / "out.jsonl"
    assert main(["predict", *arguments, "--output", str(out)]) == 0
    expected = out.read_bytes()
    out.unlink()
    with monkeypatch.context() as patch:
        ended = die_after(5, patch)
        assert main(["predict", *arguments, "--output", str(out)]) == 130
    (part,) = tmp_path.glob("out.jsonl.*.part0")
    assert not out.exists()
    lines = part.read_bytes().split(b"\n")
    assert [json.loads(line)["index"] for line in lines if line] == ended
    part.write_bytes(part.read_bytes()[:-20])  # cut the last line short
    with monkeypatch.context() as patch:
        completed = die_after(12, patch)
        assert main(["predict", *arguments, "--output", str(out)]) == 0
    assert sorted(completed) == sorted({*range(12)} - {*ended[:-1]})
    assert out.read_bytes() == expected
    assert not part.exists()


def test_completions_with_other_settings_are_not_reused(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Completions of two tokens, from a predict that was killed, and then of four."""
    out = tmp_path / "out.jsonl"
    shorter = [argument.replace("max_new_tokens=4", "max_new_tokens=2") for argument in arguments]
    with monkeypatch.context() as patch:
        die_after(3, patch)
        assert main(["predict", *shorter, "--output", str(out)]) == 130
    (part,) = tmp_path.glob("out.jsonl.*.part0")
    assert main(["predict", *arguments, "--output", str(out)]) == 0
    assert {json.loads(line)["new_tokens"] for line in out.read_text().splitlines()} == {4}
    assert part.is_file(), "it belongs to the other predict"
    assert main(["predict", *shorter, "--output", str(out)]) == 0
    assert {json.loads(line)["new_tokens"] for line in out.read_text().splitlines()} == {2}
    assert not list(tmp_path.glob("out.jsonl.*"))


def test_a_run_that_trains_cannot_be_continued_beside_it(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second fit starts inside the first, as another terminal would start it; afterwards it may."""
    training_step = LitPhi2.training_step
    codes: list[int] = []

    def start_second(self: LitPhi2, batch: Any, index: int) -> Any:
        if self.trainer.global_step == 1 and not codes:
            codes.append(main(["fit", *arguments, *settings, "--ckpt_path", "last"]))
        return training_step(self, batch, index)

    settings = ["--data.packing=false", "--checkpoint.every_n_steps=1"]
    monkeypatch.setattr(LitPhi2, "training_step", start_second)
    assert main(["fit", *arguments, *settings]) == 0
    assert codes == [2]
    stderr = capsys.readouterr().err
    assert "error: --ckpt_path" in stderr
    assert "another fit trains this run now. Wait until it ends" in stderr
    run = tmp_path / "runs" / "small" / "version_0"
    expected = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert main(["fit", *arguments, *settings, "--ckpt_path", "last"]) == 0
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == expected
    assert not list(run.rglob("*.lock"))


def test_runs_started_at_once_get_different_folders(tmp_path: Path) -> None:
    imports = "from pathlib import Path; from lit_phi2.utils.paths import create_run_dir"
    program = f"{imports}; print(create_run_dir(Path({str(tmp_path)!r}), 'x'))"
    processes = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(4)
    ]
    folders = {process.communicate()[0].strip() for process in processes}
    assert len(folders) == 4
    assert all(folders)
    assert create_run_dir(tmp_path, "x").name == "version_4"


def test_a_full_disk_ends_predict_with_one_line_and_it_continues(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk has space for all but one byte of the file, for half of it, and for ten bytes."""
    whole, output = tmp_path / "whole.jsonl", tmp_path / "output.jsonl"
    assert main(["predict", *arguments, f"--output={whole}"]) == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (whole.stat().st_size - 1, whole.stat().st_size // 2, 10):
        capsys.readouterr()
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            code = main(["predict", *arguments, f"--output={output}"])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        stderr = capsys.readouterr().err
        assert (code, "Traceback" in stderr, "File too large" in stderr) == (1, False, True), stderr
        assert not output.exists()
    assert main(["predict", *arguments, f"--output={output}"]) == 0
    assert output.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("output.jsonl.*"))
