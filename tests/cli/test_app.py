"""The command line: what a Lightning user types first, how configs and flags combine, where runs live."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from lit_phi2.cli.main import main

Jsonl = Callable[..., Path]
Records = list[dict[str, str]]
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def fit(
    phi_dir: Path, write_jsonl: Jsonl, some_records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """Runs fit on a small base and twelve records, in a folder of its own."""
    records = write_jsonl(some_records)
    monkeypatch.chdir(tmp_path)
    settings = {
        "model": {"base": str(phi_dir), "max_new_tokens": 4, "dtype": "float32"},
        "data": {"train_files": str(records), "val_files": str(records), "packing": False, "max_length": 128},
        "trainer": {"max_epochs": 2, "accelerator": "cpu"},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings))
    return lambda *arguments: main(["fit", "--config", "small.yaml", *arguments])


def last(folder: str = "runs/small/version_0") -> dict:
    return torch.load(Path(folder) / "checkpoints" / "last.ckpt", weights_only=True)


def test_fast_dev_run_takes_one_step_and_leaves_nothing(fit: Callable[..., int]) -> None:
    assert fit("--trainer.fast_dev_run", "true") == 0
    assert not Path("runs").exists()


def test_limit_train_batches_shortens_the_epoch(fit: Callable[..., int]) -> None:
    assert fit("--trainer.limit_train_batches", "3") == 0
    assert last()["global_step"] == 6


def test_overfit_batches_sees_the_same_records_in_every_epoch(
    fit: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lit_phi2.training.module import LitPhi2

    seen: list[list[str]] = []
    step = LitPhi2.training_step
    monkeypatch.setattr(
        LitPhi2,
        "training_step",
        lambda self, batch, batch_idx: seen.append(batch.record_ids) or step(self, batch, batch_idx),
    )
    assert fit("--trainer.overfit_batches", "2") == 0
    assert len(seen) == 4
    assert seen[:2] == seen[2:]
    assert seen[0] != seen[1]


def test_max_steps_ends_the_run_with_a_validation_and_an_adapter(fit: Callable[..., int]) -> None:
    assert fit("--trainer.max_steps", "5", "--trainer.accumulate_grad_batches", "2") == 0
    assert last()["global_step"] == 5
    steps = {json.loads(line)["step"] for line in Path("runs/small/version_0/samples.jsonl").read_text().splitlines()}
    assert steps == {0, 5}
    assert Path("runs/small/version_0/adapter/adapter_config.json").is_file()


def test_max_time_ends_the_run_at_a_windows_end(fit: Callable[..., int]) -> None:
    assert fit("--trainer.max_time", "00:00:00:01", "--trainer.max_epochs", "10000") == 0
    checkpoint = last()
    assert 0 < checkpoint["global_step"] < 10000 * 12
    assert Path("runs/small/version_0/adapter/adapter_config.json").is_file()


def test_logger_false_writes_no_curves_but_keeps_the_adapter(fit: Callable[..., int]) -> None:
    assert fit("--trainer.logger", "false", "--trainer.max_steps", "2") == 0
    run = Path("runs/small/version_0")
    assert not list(run.glob("events*"))
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert (run / "samples.jsonl").is_file()


def test_enable_checkpointing_false_keeps_no_weights_and_says_so(
    fit: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit("--trainer.enable_checkpointing", "false", "--trainer.max_steps", "2") == 0
    run = Path("runs/small/version_0")
    assert not (run / "checkpoints").exists()
    assert not (run / "adapter").exists()
    assert "no adapter will be kept" in capsys.readouterr().err


def test_early_stopping_in_yaml_stops_the_run(fit: Callable[..., int], tmp_path: Path) -> None:
    callbacks = [
        {
            "class_path": "lightning.pytorch.callbacks.EarlyStopping",
            "init_args": {"monitor": "val/loss", "patience": 1, "min_delta": 1e9},
        }
    ]
    (tmp_path / "early.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    assert fit("--config", "early.yaml", "--run_name", "early", "--trainer.max_epochs", "9") == 0
    assert last("runs/early/version_0")["global_step"] == 2 * 12  # the first to compare with, the second too alike
    assert Path("runs/early/version_0/adapter").is_dir()


def test_a_checkpoint_callback_of_lightning_is_refused_with_the_reason(
    fit: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoint.yaml").write_text(
        yaml.safe_dump({"trainer": {"callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}]}})
    )
    assert fit("--config", "checkpoint.yaml") == 2
    assert "trainer.callbacks: ModelCheckpoint" in capsys.readouterr().err


def test_flags_win_over_configs_wherever_they_stand(
    phi_dir: Path, write_jsonl: Jsonl, some_records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(some_records)
    (tmp_path / "a.yaml").write_text(f"model:\n  base: {phi_dir}\n  lora_r: 3\n  lora_alpha: 3\n")
    (tmp_path / "b.yaml").write_text("model:\n  lora_alpha: 6\ndata:\n  max_length: 100\n")
    flags = [
        "--model.lora_r",
        "5",
        "--data.train_files",
        "records.jsonl",
        "--data.val_files=null",
        "--data.val_fraction",
        "0.4",
    ]
    arguments = ["fit", *flags, "--config", "a.yaml", "--trainer.max_steps", "1", "--config=b.yaml"]
    assert main(arguments) == 0
    saved = yaml.safe_load(Path("runs/b/version_0/config.yaml").read_text())
    assert saved["run_name"] == "b", "the stem of the last config"
    assert saved["model"]["lora_r"] == 5
    assert saved["model"]["lora_alpha"] == 6
    assert saved["data"]["max_length"] == 100
    assert saved["data"]["val_files"] is None


def test_every_subcommand_runs_from_the_saved_config(
    fit: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit("--trainer.max_steps", "2") == 0
    config = Path("runs/small/version_0/config.yaml")
    assert "ckpt_path" not in config.read_text()
    run = "runs/small/version_0"
    own = ["--data.test_files", "records.jsonl", "--data.predict_files", "records.jsonl"]
    capsys.readouterr()
    assert main(["validate", "--config", str(config), "--ckpt_path", "last"]) == 0
    assert main(["test", "--config", str(config), "--ckpt_path", run, *own]) == 0
    assert main(["inspect", "--config", str(config)]) == 0
    printed = capsys.readouterr().out
    for name in ("val/loss", "val/perplexity", "val/token_accuracy", "test/loss", "supervised tokens", ">>>"):
        assert name in printed
    assert main(["predict", "--config", str(config), "--ckpt_path", f"{run}/adapter", *own]) == 0
    assert len(Path(run, "predictions.jsonl").read_text().splitlines()) == 12
    assert main(["export", "--ckpt_path", "best", "--run_name", "small", "--output_dir", "out"]) == 0
    exported, kept = (Path(folder, "adapter_model.safetensors").read_bytes() for folder in ("out", f"{run}/adapter"))
    assert exported == kept
    assert main(["export", "--ckpt_path", run, "--output_dir", str(config)]) == 2
    assert main(["fit", "--config", str(config)]) == 0
    assert Path("runs/small/version_1/checkpoints/last.ckpt").is_file()
    first, second = last(), last("runs/small/version_1")
    assert all(torch.equal(first["state_dict"][name], weight) for name, weight in second["state_dict"].items())


def test_the_checkpoint_decides_the_shape_and_differences_are_told(
    fit: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit("--trainer.max_steps", "1", "--model.target_modules", "[fc1]", "--model.lora_r", "3") == 0
    capsys.readouterr()
    arguments = ["validate", "--config", "small.yaml", "--ckpt_path", "last", "--model.lora_r", "7"]
    assert main(arguments) == 0
    told = capsys.readouterr().err
    assert "model.lora_r: 3, as in" in told
    assert "model.target_modules: ['fc1'], as in" in told


def test_without_a_checkpoint_the_base_runs_as_it_is_in_a_folder_of_its_own(fit: Callable[..., int]) -> None:
    arguments = ["predict", "--config", "small.yaml", "--data.predict_files", "records.jsonl"]
    assert main(arguments) == 0
    predictions = [json.loads(line) for line in Path("runs/small/base/predictions.jsonl").read_text().splitlines()]
    assert [prediction["id"] for prediction in predictions] == [f"r{number}" for number in range(12)]
    assert set(predictions[0]) == {
        "id",
        "instruction",
        "input",
        "response",
        "completion",
        "finish_reason",
        "new_tokens",
    }


def test_predict_needs_no_response_and_writes_where_asked(fit: Callable[..., int], some_records: Records) -> None:
    Path("asked.jsonl").write_text(
        "".join(json.dumps({"instruction": record["instruction"]}) + "\n" for record in some_records)
    )
    arguments = ["predict", "--config", "small.yaml", "--data.predict_files", "asked.jsonl", "--output", "out/a.jsonl"]
    assert main(arguments) == 0
    rows = [json.loads(line) for line in Path("out/a.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"asked.jsonl:{line}" for line in range(1, 13)]
    assert all(row["response"] == "" for row in rows)


@pytest.mark.parametrize("name", ["tiny.yaml", "tiny-full.yaml", "phi2.yaml"])
def test_the_packaged_configs_parse_and_are_the_recipe(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(CONFIGS / name), "--print_config"])
    assert stopped.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["target_modules"] == ["Wqkv", "fc1", "fc2"]
    if name == "phi2.yaml":
        assert (config["model"]["base"], config["data"]["max_length"]) == ("microsoft/phi-2", 512)
        assert (config["model"]["lora_r"], config["model"]["learning_rate"]) == (2, 2e-4)
        assert (config["trainer"]["max_epochs"], config["data"]["batch_size"]) == (3, 1)


def test_no_line_of_output_advertises_anything(fit: Callable[..., int]) -> None:
    """In a process of its own, as a user sees it."""
    command = [sys.executable, "-m", "lit_phi2", "fit", "--config", "small.yaml", "--trainer.max_steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    output = done.stdout + done.stderr
    assert "trains" in output, "our own lines are there"
    for word in ("Tip", "litlogger", "litmodels", "pip install", "Warning", "GPU available", "deprecated", "http"):
        assert word not in output, output


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_says_how_to_continue_and_exits_with_its_code(
    number: signal.Signals, code: int, fit: Callable[..., int]
) -> None:
    command = [sys.executable, "-m", "lit_phi2", "fit", "--config", "small.yaml", "--trainer.max_epochs", "2000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    samples = Path("runs/small/version_0/samples.jsonl")
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not (samples.is_file() and '"step": 12' in samples.read_text()):
        time.sleep(0.1)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert "--ckpt_path runs/small/version_0/checkpoints/last.ckpt" in errors
    assert last()["global_step"] >= 12


def test_a_run_that_started_from_an_adapter_is_resumed_and_measured_from_its_own_config(
    fit: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit("--trainer.max_steps", "2") == 0
    assert fit("--trainer.max_steps", "3", "--run_name", "second", "--model.adapter", "runs/small/version_0") == 0
    config = "runs/second/version_0/config.yaml"
    saved = yaml.safe_load(Path(config).read_text())
    assert saved["model"]["adapter"] == "runs/small/version_0/checkpoints/best.ckpt"
    first = last("runs/second/version_0")
    assert main(["fit", "--config", config, "--ckpt_path", "last"]) == 0
    assert all(
        torch.equal(first["state_dict"][name], weight)
        for name, weight in last("runs/second/version_0")["state_dict"].items()
    )
    assert main(["validate", "--config", config, "--ckpt_path", "best"]) == 0
    assert "model.adapter: runs/small/version_0/checkpoints/best.ckpt is not read" in capsys.readouterr().err
