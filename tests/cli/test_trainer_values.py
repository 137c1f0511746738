"""Every key of Lightning's Trainer with 0, -1, a huge value and null: refused with its name, or harmless.

Harmless means that the run is the same as without the key, or differs as configs/README.md says. The keys come from the
signature of Lightning's Trainer, so a key of a new version is walked, too.
"""

import inspect
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml

from lit_phi2.cli.main import main
from lit_phi2.cli.trainer_values import check_devices
from lit_phi2.errors import InputError

Row = dict[str, str]

KEYS = list(inspect.signature(pl.Trainer.__init__).parameters)[1:]
HUGE = str(10**30)
VALUES = ("0", "-1", HUGE, "null")
_NULL = "precision logger callbacks max_time profiler plugins model_registry gradient_clip_algorithm deterministic"
_NULL += " benchmark enable_checkpointing enable_progress_bar enable_model_summary val_check_interval"
_NULL += " check_val_every_n_epoch min_epochs min_steps limit_train_batches limit_val_batches"
_NULL += " limit_test_batches limit_predict_batches gradient_clip_val"
_ZERO = "min_epochs min_steps limit_test_batches limit_predict_batches gradient_clip_val overfit_batches fast_dev_run"
_ZERO += " reload_dataloaders_every_n_epochs default_root_dir"  # a folder may have any name
_HUGE = "limit_train_batches limit_val_batches limit_test_batches limit_predict_batches gradient_clip_val max_steps"
# Keys of one run; then its optimizer steps, and its validations, the first of which measures the base.
HARMLESS: list[tuple[dict[str, str], tuple[int, int]]] = [
    (dict.fromkeys(_NULL.split(), "null"), (3, 2)),
    (dict.fromkeys(_ZERO.split(), "0"), (3, 2)),
    (dict.fromkeys([*_HUGE.split(), "default_root_dir"], HUGE), (3, 2)),
    ({"max_steps": "-1", "num_sanity_val_steps": "-1", "default_root_dir": "-1"}, (3, 2)),
    ({"num_sanity_val_steps": "0"}, (3, 1)),
    ({"limit_val_batches": "0"}, (3, 0)),
    ({"overfit_batches": HUGE}, (3, 2)),
    ({"max_epochs": HUGE}, (3, 2)),  # max_steps ends this run
    ({"log_every_n_steps": HUGE}, (3, 2)),
    ({"log_every_n_steps": "null"}, (3, 2)),
]
_ACCEPTED = {pair for settings, _ in HARMLESS for pair in settings.items()} | {("fast_dev_run", HUGE)}
REFUSED = [(key, value) for key in KEYS for value in VALUES if (key, value) not in _ACCEPTED]
REFUSED.remove(("devices", HUGE))  # tried below without a run, which would start so many processes if it were taken


@pytest.fixture
def fit(
    phi_dir: Path,
    write_jsonl: Callable[..., Path],
    record_rows: list[Row],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., int]:
    """Runs fit on three records for one epoch; returns the exit code."""
    train, val = write_jsonl(record_rows[:3], "train.jsonl"), write_jsonl(record_rows[3:5], "val.jsonl")
    monkeypatch.chdir(tmp_path)
    settings = {
        "model": {"base": str(phi_dir), "max_new_tokens": 1, "dtype": "float32"},
        "data": {"train_files": str(train), "val_files": str(val), "packing": False, "max_length": 128},
        "trainer": {"max_epochs": 1, "accelerator": "cpu"},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings))
    return lambda *arguments: main(["fit", "--config", "small.yaml", *arguments])


def test_every_other_value_is_refused_with_its_key(fit: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert len(REFUSED) > 100
    for key, value in REFUSED:
        assert fit(f"--trainer.{key}={value}") == 2, (key, value)
        error = capsys.readouterr().err
        assert f"trainer.{key}" in error, (key, value, error)
        assert "device cpu" not in error, "the model is not loaded"
        assert not Path("runs").exists(), (key, value)


@pytest.mark.parametrize(("settings", "effect"), HARMLESS, ids=[", ".join(settings)[:30] for settings, _ in HARMLESS])
def test_harmless_values_train_the_same_run(
    settings: dict[str, str], effect: tuple[int, int], fit: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    limit = ["--trainer.max_steps=3"] if "max_epochs" in settings else []
    assert fit("--run_name=run", *[f"--trainer.{key}={value}" for key, value in settings.items()], *limit) == 0
    output = capsys.readouterr().err
    assert ("the training curves are empty" in output) == ("log_every_n_steps" in settings)
    last = Path(settings.get("default_root_dir", "runs"), "run", "version_0", "checkpoints", "last.ckpt")
    assert (torch.load(last, weights_only=True)["global_step"], output.count("val/loss")) == effect


def test_a_dry_run_of_all_batches_leaves_no_folder(fit: Callable[..., int]) -> None:
    assert fit(f"--trainer.fast_dev_run={HUGE}") == 0
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("key", "value", "cure"),
    [
        ("val_check_interval", "0", "trainer.limit_val_batches: 0 validates never"),
        ("check_val_every_n_epoch", "0", "trainer.limit_val_batches: 0 validates never"),
        ("log_every_n_steps", "0", "trainer.logger: false writes no curves"),
        ("accumulate_grad_batches", "0", "1 takes an optimizer step after every micro-batch"),
        ("accumulate_grad_batches", HUGE, f"is not below {2**31}"),
        ("gradient_clip_val", "-1", "null or 0 clips nothing"),
        ("gradient_clip_val", ".nan", "null or 0 clips nothing"),
        ("devices", "0", "expected auto, or at least 1"),
        ("num_nodes", "2", "need torchrun or SLURM"),
        ("max_epochs", "-1", "the learning-rate schedule needs one of them"),
        ("max_epochs", "-5", "expected at least 1; -1 has no limit"),
        ("max_time", "00:00:00:00", "leaves no time"),
        ("max_time", "1:00", "expected a duration as DD:HH:MM:SS, such as '00:01:30:00'"),
        ("max_time", "{fortnights: 1}", "expected a duration as DD:HH:MM:SS"),
        ("val_check_interval", "{seconds: 0}", "is no time"),
        ("limit_val_batches", "1.5", "expected 0.0 to 1.0, or a whole number of batches"),
        ("sync_batchnorm", "true", "must be false"),
        ("profiler", "xla", "expected one of null, simple, advanced, pytorch"),
        ("strategy", "fsdp", "Use auto or ddp"),
    ],
)
def test_a_refused_value_has_a_cure(
    key: str, value: str, cure: str, fit: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(f"--trainer.{key}={value}") == 2
    error = capsys.readouterr().err
    assert f"trainer.{key}" in error
    assert cure in error
    assert not Path("runs").exists()


def test_more_processes_than_a_machine_can_run_are_refused() -> None:
    with pytest.raises(
        InputError, match=rf"trainer\.devices: {HUGE} processes are too many .* auto starts one process"
    ):
        check_devices(HUGE, "cpu")
    check_devices(4, "cpu")
    check_devices("auto", "auto")


def test_an_unquoted_duration_says_how_to_write_it(
    fit: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """YAML 1.1 reads 1:30:00 as the number 5400."""
    (tmp_path / "time.yaml").write_text("trainer: {max_time: 1:30:00}\n")
    assert fit("--config", "time.yaml") == 2
    error = capsys.readouterr().err
    assert 'time.yaml: key "trainer.max_time"' in error
    assert "Got value: 5400. A duration is a text: '00:01:30:00'" in error


@pytest.mark.parametrize(
    ("name", "init_args", "others", "cure"),
    [
        ("EarlyStopping", {"monitor": "val/loss"}, {"limit_val_batches": 0}, "trainer.limit_val_batches is 0"),
        (
            "EarlyStopping",
            {"monitor": "val/loss"},
            {"val_check_interval": "00:00:00:01"},
            "check_on_train_epoch_end: false",
        ),
        (
            "EarlyStopping",
            {"monitor": "val/loss", "check_on_train_epoch_end": True},
            {"check_val_every_n_epoch": 2, "max_epochs": 2},
            "check_on_train_epoch_end: false",
        ),
        ("EarlyStopping", {"monitor": "val/loss", "mode": "least"}, {}, "EarlyStopping cannot be built"),
        ("Timer", {"duration": "00:01:00:00"}, {}, "interval: step or epoch"),
        ("Timer", {}, {}, "Timer has no duration"),
        ("Timer", {"duration": "1:00"}, {}, "DD:HH:MM:SS"),
        ("LearningRateMonitor", {}, {"logger": False}, "trainer.logger is false"),
        ("DeviceStatsMonitor", {}, {"logger": False}, "trainer.logger is false"),
    ],
)
def test_a_callback_that_cannot_work_is_refused(
    name: str,
    init_args: dict[str, object],
    others: dict[str, object],
    cure: str,
    fit: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    callback = {"class_path": name, "init_args": init_args} if init_args else {"class_path": name}
    (tmp_path / "callback.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback], **others}}))
    assert fit("--config", "callback.yaml") == 2
    error = capsys.readouterr().err
    assert name in error
    assert cure in error
    assert "device cpu" not in error, "the model is not loaded"
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", ["LearningRateMonitor", "DeviceStatsMonitor"])
def test_fast_dev_run_tries_callbacks_that_log(name: str, fit: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / "callback.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [{"class_path": name}]}}))
    assert fit("--config", "callback.yaml", "--trainer.fast_dev_run", "true") == 0
    assert not Path("runs").exists()
    assert not list(Path().rglob("events*"))
