"""Nothing is lost: checkpoints as often as asked, files whole on a full disk, predictions that go on after a kill."""

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import new_data, new_module, new_trainer
from lit_phi2.adapters.checkpoint import read_checkpoint
from lit_phi2.cli.main import main
from lit_phi2.training.callbacks.checkpoint import AtomicCheckpointIO
from lit_phi2.training.module import LitPhi2
from lit_phi2.utils.files import atomic_write
from lit_phi2.utils.paths import create_run_dir

ROOT = Path(__file__).parents[2]


@pytest.fixture
def arguments(phi_dir: Path, some_records: list[dict[str, str]], write_jsonl: Callable[..., Path]) -> list[str]:
    """Of any subcommand: twelve records on the small base, in windows of two micro-batches."""
    file = write_jsonl(list(some_records))
    uses = [f"--data.{use}_files={file}" for use in ("train", "val", "predict")]
    given = {
        "run_name": "small",
        "model.base": phi_dir,
        "model.max_new_tokens": 4,
        "model.dtype": "float32",
        "data.max_length": 128,
        "trainer.default_root_dir": file.parent / "runs",
        "trainer.max_epochs": 1,
        "trainer.enable_progress_bar": "false",
    }
    return [*uses, *(f"--{key}={value}" for key, value in given.items())]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"checkpoint_every_n_steps": 2}, [2, 4, 6]),
        ({"checkpoint_every_minutes": 1e-9}, [1, 2, 3, 4, 5, 6]),
        ({"checkpoint_every_minutes": 60.0}, [6]),
        ({}, [6]),
    ],
)
def test_checkpoints_come_so_often_as_asked_and_at_the_end(
    settings: dict[str, Any],
    expected: list[int],
    phi_dir: Path,
    some_records: list[dict[str, str]],
    write_jsonl: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twelve rows in windows of two: six steps; at the end the validation writes, and then the epoch."""
    written: list[int] = []
    save = AtomicCheckpointIO.save_checkpoint

    def spy(self: AtomicCheckpointIO, checkpoint: dict[str, Any], path: Path, storage_options: Any = None) -> None:
        written.append(checkpoint["global_step"])
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", spy)
    trainer = new_trainer(tmp_path, keep=True, accumulate_grad_batches=2)
    for name, value in settings.items():
        setattr(trainer, name, value)
    trainer.fit(new_module(phi_dir), new_data(phi_dir, write_jsonl(list(some_records)), packing=False))
    assert sorted(set(written)) == expected


@pytest.mark.parametrize("key", ["every_n_steps", "every_minutes"])
def test_a_checkpoint_never_is_refused(key: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *arguments, f"--checkpoint.{key}=0"]) == 2
    assert f"checkpoint.{key}: 0" in capsys.readouterr().err


def test_a_validation_that_falls_due_inside_a_window_waits_for_its_end(
    phi_dir: Path, some_records: list[dict[str, str]], write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    """Twelve micro-batches in windows of three, a validation due after 2, 4, 6, ...: one a window, at its end."""
    seen: list[tuple[int, int]] = []

    class Module(LitPhi2):
        def on_validation_epoch_end(self) -> None:
            super().on_validation_epoch_end()
            ready = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
            seen.append((self.trainer.global_step, ready))

    module = new_module(phi_dir)
    module.__class__ = Module
    trainer = new_trainer(tmp_path, keep=True, accumulate_grad_batches=3, val_check_interval=2)
    trainer.fit(module, new_data(phi_dir, write_jsonl(list(some_records)), packing=False))
    assert seen == [(1, 3), (2, 6), (3, 9), (4, 12)]


def test_a_replaced_file_is_the_old_one_or_the_new(tmp_path: Path) -> None:
    file = tmp_path / "kept.json"
    atomic_write(file, "old")

    def torn() -> Any:
        yield "new, but"
        raise OSError(28, "No space left on device", "somewhere")

    with pytest.raises(OSError, match=r"No space left on device: .*kept\.json"):
        atomic_write(file, torn())
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"], "what was written so far is removed"


def test_a_full_disk_at_any_file_ends_the_run_plainly_and_the_last_checkpoint_loads(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of files stands for the disk: for each size of a file of a whole run, one byte less."""
    settings = [*arguments, "--data.packing=false", "--checkpoint.every_n_steps=2"]
    assert main(["fit", *settings]) == 0
    whole = tmp_path / "runs" / "small" / "version_0"
    sizes = {path.stat().st_size: path.name for path in whole.rglob("*") if path.is_file()}
    assert len(sizes) >= 6
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size, name in sorted(sizes.items()):
        capsys.readouterr()
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, hard))
        try:
            code = main(["fit", *settings])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        said = capsys.readouterr().err
        assert (code, "Traceback" in said) == (1, False), (name, said)
        assert "File too large" in said, (name, said)
        newest = max((tmp_path / "runs" / "small").iterdir(), key=lambda run: int(run.name.rpartition("_")[2]))
        for kept in (newest / "checkpoints").glob("*"):
            assert kept.suffix == ".ckpt", "nothing half-written is left"
            read_checkpoint(kept)
        if (newest / "checkpoints" / "last.ckpt").is_file():  # and once there is room, the run goes on
            assert main(["fit", *settings, "--ckpt_path", "last"]) == 0
            final, expected = ((run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (newest, whole))
            assert final == expected


def test_a_folder_that_may_not_be_written_is_told_plainly(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root every folder may be written, so the refusal is the system's own, made to happen."""

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "runs"))

    monkeypatch.setattr("lit_phi2.training.trainer.create_run_dir", refuse)
    assert main(["fit", *arguments]) == 1
    said = capsys.readouterr().err
    assert f"error: {tmp_path / 'runs'}: Permission denied" in said
    assert "Traceback" not in said


def test_predict_goes_on_where_it_was_killed_with_the_same_answers(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_phi2.data.loaders._PREDICT_PROMPTS", 3)  # four batches
    out = tmp_path / "out.jsonl"
    assert main(["predict", *arguments, "--output", str(out)]) == 0
    expected = out.read_bytes()
    out.unlink()
    predict_step, completed = LitPhi2.predict_step, []

    def die_at_the_third(self: LitPhi2, batch: Any, index: int) -> Any:
        if len(completed) == 2:
            raise KeyboardInterrupt
        completed.append(batch.indices)
        return predict_step(self, batch, index)

    monkeypatch.setattr(LitPhi2, "predict_step", die_at_the_third)
    assert main(["predict", *arguments, "--output", str(out)]) == 130
    part = out.with_name("out.jsonl.part")
    assert not out.exists()
    lines = part.read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["index"] for line in lines[1:]] == [*completed[0], *completed[1]]
    part.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])  # and the last line was cut

    def count(self: LitPhi2, batch: Any, index: int) -> Any:
        completed.append(batch.indices)
        return predict_step(self, batch, index)

    monkeypatch.setattr(LitPhi2, "predict_step", count)
    first, second = completed.pop(0), completed.pop(0)
    assert main(["predict", *arguments, "--output", str(out)]) == 0
    assert first not in completed
    assert second in completed, "its last line was torn"
    assert len(completed) == 3
    assert out.read_bytes() == expected
    assert not part.exists()


def test_answers_of_another_model_are_not_taken_over(arguments: list[str], tmp_path: Path) -> None:
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    part.write_text('{"adapter": "another"}\n{"index": 0, "completion": "stale", "finish_reason": "stop"}\n')
    assert main(["predict", *arguments, "--output", str(out)]) == 0
    assert "stale" not in out.read_text()
    assert not part.exists()


def test_runs_started_at_once_get_folders_of_their_own(tmp_path: Path) -> None:
    program = f"from lit_phi2.utils.paths import create_run_dir; from pathlib import Path; print(create_run_dir(Path({str(tmp_path)!r}), 'x'))"
    processes = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(4)
    ]
    folders = {process.communicate()[0].strip() for process in processes}
    assert len(folders) == 4
    assert all(folders)
    assert create_run_dir(tmp_path, "x").name == "version_4"


def test_a_full_disk_while_predicting_ends_plainly_and_predict_goes_on(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The .part is the larger file, so it is short of a byte, of half, or of all but a few bytes."""
    whole, output = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    assert main(["predict", *arguments, f"--output={whole}"]) == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (whole.stat().st_size - 1, whole.stat().st_size // 2, 10):
        capsys.readouterr()
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            code = main(["predict", *arguments, f"--output={output}"])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        said = capsys.readouterr().err
        assert (code, "Traceback" in said, "File too large" in said) == (1, False, True), said
        assert not output.exists()
    assert main(["predict", *arguments, f"--output={output}"]) == 0
    assert output.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("answers.jsonl.*"))
