"""The subcommands on a run that fit wrote: which config, which checkpoint, which folder."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from helpers import digest_of_tensors
from lit_phi2.cli.main import main

Fit = Callable[..., int]
ReadLast = Callable[..., dict]
RUN = "runs/small/version_0"


def test_every_subcommand_runs_from_the_saved_config(
    fit: Fit, read_last: ReadLast, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit("--trainer.max_steps", "2") == 0
    config = Path(RUN, "config.yaml")
    assert "ckpt_path" not in config.read_text()
    files = ["--data.test_files", "records.jsonl", "--data.predict_files", "records.jsonl"]
    capsys.readouterr()
    assert main(["validate", "--config", str(config), "--ckpt_path", "last"]) == 0
    assert main(["test", "--config", str(config), "--ckpt_path", RUN, *files]) == 0
    assert main(["inspect", "--config", str(config)]) == 0
    printed = capsys.readouterr().out
    for name in ("val/loss", "val/perplexity", "val/token_accuracy", "test/loss", "supervised tokens", ">>>"):
        assert name in printed
    assert main(["predict", "--config", str(config), "--ckpt_path", f"{RUN}/adapter", *files]) == 0
    assert len(Path(RUN, "predictions.jsonl").read_text().splitlines()) == 12
    assert main(["export", "--config", str(config), "--ckpt_path", "best", "--output_dir", "out"]) == 0
    weights = [Path(folder, "adapter_model.safetensors") for folder in ("out", f"{RUN}/adapter")]
    assert digest_of_tensors(weights[0]) == digest_of_tensors(weights[1])
    assert main(["export", "--ckpt_path", RUN, "--output_dir", str(config)]) == 2
    assert main(["fit", "--config", str(config)]) == 0
    assert Path("runs/small/version_1/checkpoints/last.ckpt").is_file()
    first, second = read_last(), read_last("runs/small/version_1")
    assert all(torch.equal(first["state_dict"][name], weight) for name, weight in second["state_dict"].items())


def test_checkpoint_settings_replace_those_of_the_config(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--model.target_modules", "[fc1]", "--model.lora_r", "3", "--model.use_rslora", "true"]
    assert fit("--trainer.max_steps", "1", *settings) == 0
    capsys.readouterr()
    arguments = ["validate", "--config", "small.yaml", "--ckpt_path", "last", "--model.lora_r", "7"]
    assert main(arguments) == 0
    logged = capsys.readouterr().err
    assert "model.lora_r: 3, as in" in logged
    assert "model.target_modules: ['fc1'], as in" in logged
    assert "model.use_rslora: True, as in" in logged


def test_predict_without_a_checkpoint_runs_the_base(fit: Fit) -> None:
    arguments = ["predict", "--config", "small.yaml", "--data.predict_files", "records.jsonl"]
    assert main(arguments) == 0
    predictions = [json.loads(line) for line in Path("runs/small/base/predictions.jsonl").read_text().splitlines()]
    assert [prediction["id"] for prediction in predictions] == [f"r{number}" for number in range(12)]
    assert set(predictions[0]) == {
        "id",
        "instruction",
        "input",
        "reference",
        "completion",
        "finish_reason",
        "new_tokens",
    }


def test_predict_needs_no_response_and_writes_to_output(fit: Fit, record_rows: list[dict[str, str]]) -> None:
    Path("prompts.jsonl").write_text(
        "".join(json.dumps({"instruction": record["instruction"]}) + "\n" for record in record_rows)
    )
    arguments = ["predict", "--config", "small.yaml", "--data.predict_files", "prompts.jsonl"]
    assert main([*arguments, "--output", "out/a.jsonl"]) == 0
    rows = [json.loads(line) for line in Path("out/a.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"prompts.jsonl:{line}" for line in range(1, 13)]
    assert all("reference" not in row for row in rows)


def test_a_run_from_an_adapter_resumes_from_its_own_config(
    fit: Fit, read_last: ReadLast, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit("--trainer.max_steps", "2") == 0
    assert fit("--trainer.max_steps", "3", "--run_name", "second", "--model.adapter", RUN) == 0
    config = "runs/second/version_0/config.yaml"
    saved = yaml.safe_load(Path(config).read_text())
    assert saved["model"]["adapter"] == f"{RUN}/checkpoints/best.ckpt"
    first = read_last("runs/second/version_0")
    assert main(["fit", "--config", config, "--ckpt_path", "last"]) == 0
    second = read_last("runs/second/version_0")
    assert all(torch.equal(first["state_dict"][name], weight) for name, weight in second["state_dict"].items())
    assert main(["validate", "--config", config, "--ckpt_path", "best"]) == 0
    assert f"model.adapter: {RUN}/checkpoints/best.ckpt is not read" in capsys.readouterr().err
