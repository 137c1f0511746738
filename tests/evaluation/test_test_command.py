"""The `test` subcommand as a whole, compared with the model's completions of single prompts and with other runs."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerBase

from helpers import new_data, new_module, new_trainer
from lit_phi2.adapters.peft_format import save_adapter
from lit_phi2.cli.main import main
from lit_phi2.data.prompts import format_prompt
from lit_phi2.errors import InputError
from lit_phi2.evaluation.table import metric_name
from lit_phi2.generation.engine import Completion, Engine
from lit_phi2.model.lora import trainable_parameters
from lit_phi2.training.callbacks.completions import TestCompletions
from lit_phi2.training.module import LitPhi2
from lit_phi2.training.trainer import Trainer

Jsonl = Callable[..., Path]
Rows = list[dict[str, Any]]
RunCommand = Callable[..., int]


@pytest.fixture
def scored_file(write_jsonl: Jsonl, record_rows: Rows) -> Path:
    """Twelve records; those with an input have one fact that is in it and one that is nowhere."""
    for number, record in enumerate(record_rows):
        record["response"] = f"{record['response']} " * 9  # so that no prompt is over 1.5 times its length
        record["instruction"] += f" {number}"  # no two prompts are equal
        record["category"] = "even" if number % 2 == 0 else "odd"
        record["form"] = "explain"
        if record["input"]:
            words = record["input"].split()
            record["facts"] = [
                {"text": " ".join(words[:2]), "kind": "copied"},
                {"text": f"fact-{number}", "kind": "known"},
            ]
    return write_jsonl(record_rows, "test.jsonl")


@pytest.fixture
def adapter_dir(phi_dir: Path, tmp_path: Path) -> Path:
    """An adapter that changes the completions."""
    module = new_module(phi_dir)
    assert module.phi is not None
    with torch.no_grad():
        for name, parameter in trainable_parameters(module.phi).items():
            if "lora_B" in name:
                parameter *= 30
    save_adapter(module.trained_adapter(), tmp_path / "trained" / "adapter")
    return tmp_path / "trained" / "adapter"


def new_model(base: Path, **settings: Any) -> LitPhi2:
    """As the CLI makes it: without an adapter, LoRA changes nothing."""
    settings = {"dtype": "float32", "max_new_tokens": 24, "lora_r": 4, "lora_alpha": 8} | settings
    return LitPhi2(base=str(base), **settings)


def run_test(root: Path, model: LitPhi2, train: Path, test: Path, max_completions: int | None = None) -> Trainer:
    trainer = new_trainer(root)
    data = new_data(Path(model.base), train, test_files=str(test), max_length=400, max_new_tokens=model.max_new_tokens)
    trainer.test(model, data, max_completions=max_completions)
    return trainer


def metrics_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "test_metrics.json").read_text())


def completions_of(trainer: Trainer) -> dict[str, list[Completion]]:
    return next(callback.completions for callback in trainer.callbacks if isinstance(callback, TestCompletions))


@pytest.fixture
def run_command(phi_dir: Path, scored_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunCommand:
    """Runs the test subcommand in a folder of its own; the test records are the training records too."""
    monkeypatch.chdir(tmp_path)
    settings = {
        "model": {"base": str(phi_dir), "max_new_tokens": 8, "dtype": "float32"},
        "data": {"train_files": scored_file.name, "test_files": scored_file.name, "max_length": 400},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings))
    return lambda *arguments: main(["test", "--config", "small.yaml", *arguments])


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Collects every prompt that a model completes."""
    collected: list[list[int]] = []
    submit = Engine.submit

    def collect(self: Engine, key: int, prompt: list[int], *limit: int) -> None:
        collected.append(prompt)
        submit(self, key, prompt, *limit)

    monkeypatch.setattr(Engine, "submit", collect)
    return collected


def test_without_a_checkpoint_the_base_and_baselines_are_scored(
    phi_dir: Path, scored_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is printed is what test_metrics.json contains. By hand: copy_prompt has one of a record's two facts, and
    nearest is the reference itself, since the training records are the test records."""
    run_test(tmp_path, new_model(phi_dir), scored_file, scored_file)
    metrics = metrics_of(tmp_path / "run" / "base")
    columns = metrics.pop("completions")
    assert list(columns) == ["base", "copy_prompt", "nearest"]
    names = {"fact recall", "facts copied", "facts known", "form explain", "category odd"}  # "even" has no facts
    faults = {"empty", "echo", "unsupported amounts", "unsupported dates", "unsupported identifiers"}
    names |= {"ROUGE-L", "chrF", "length ratio", "repeated 8-gram", *faults}
    groups = ("form explain", "category odd", "category even")
    in_file = names | {f"{group}: {name}" for group in groups for name in ("chrF", *faults)}
    assert set(columns["base"]) == in_file | {"eos_rate"}
    assert set(columns["copy_prompt"]) == set(columns["nearest"]) == in_file
    assert columns["copy_prompt"]["echo"]["mean"] == 1.0
    columns["base"] = {name: cell for name, cell in columns["base"].items() if name in {*names, "eos_rate"}}
    assert columns["copy_prompt"]["facts copied"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "records": 6}
    assert columns["copy_prompt"]["fact recall"]["mean"] == 0.5
    assert columns["nearest"]["ROUGE-L"]["mean"] == pytest.approx(1.0)
    logged = {metric_name(name): cell["mean"] for name, cell in columns["base"].items() if name != "category odd"}
    losses = {"test/loss", "test/perplexity", "test/token_accuracy"}
    assert set(metrics) == set(logged) | losses
    assert {name: metrics[name] for name in logged} == logged
    printed = capsys.readouterr().out.splitlines()
    for name, value in metrics.items():
        assert f"{name} {value:.6f}" in printed
    start = next(number for number, line in enumerate(printed) if line.startswith("| metric"))
    assert printed[start].replace("|", " ").split() == ["metric", "base", "copy_prompt", "nearest", "records"]
    shown = {line[: printed[start].index("base")].strip("| ") for line in printed[start + 2 :]}
    assert shown == set(columns["base"])


def test_each_completion_is_scored_against_its_own_record(
    phi_dir: Path,
    record_rows: Rows,
    write_jsonl: Jsonl,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    """Reference: single prompts. The model's completion of a prompt is that record's fact, so it always matches."""
    model = new_model(phi_dir)
    model.configure_model()
    facts = []
    for number, record in enumerate(record_rows):
        record["instruction"] += f" {number}"
        prompt = tokenizer(format_prompt(record["instruction"], record["input"]), add_special_tokens=False)["input_ids"]
        text = tokenizer.decode(model.generate([prompt])[0].ids)
        record["response"] = "claim " * 50
        if text.strip():
            facts.append(text)
            record["facts"] = [{"text": text, "kind": "generated"}]
    assert len(set(facts)) > 6, "completions differ, so that another record's would not match"
    path = write_jsonl(record_rows, "generated.jsonl")
    run_test(tmp_path, model, path, path)
    recall = metrics_of(tmp_path / "run" / "base")["completions"]["base"]["fact recall"]
    assert recall == {"mean": 1.0, "low": 1.0, "high": 1.0, "records": len(facts)}


def test_a_completion_does_not_depend_on_its_batch(
    phi_dir: Path,
    scored_file: Path,
    record_rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    tmp_path: Path,
) -> None:
    """Reference: each prompt alone, tokenized here."""
    model = new_model(phi_dir)
    trainer = run_test(tmp_path, model, scored_file, scored_file)
    expected = [
        tokenizer(format_prompt(record["instruction"], record["input"]), add_special_tokens=False)["input_ids"]
        for record in record_rows
    ]
    lengths = [len(prompt) for prompt in prompts]
    assert sorted(prompts) == sorted(expected)
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) > 4
    completions = completions_of(trainer)["base"]
    assert len({tuple(completion.ids) for completion in completions}) > 6
    assert completions == [model.generate([prompt])[0] for prompt in expected]


def test_with_an_adapter_the_base_completes_as_it_does_alone(
    phi_dir: Path, scored_file: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    """Reference: a run without the adapter. Afterwards the adapter is enabled again."""
    trainer_alone = run_test(tmp_path / "alone", new_model(phi_dir), scored_file, scored_file)
    model = new_model(phi_dir, adapter=str(adapter_dir))
    trainer_both = run_test(tmp_path / "both", model, scored_file, scored_file)
    alone, both = (metrics_of(tmp_path / name / "run" / "base") for name in ("alone", "both"))
    assert list(both["completions"]) == ["adapter", "base", "copy_prompt", "nearest"]
    assert both["completions"]["base"] == alone["completions"]["base"]
    assert completions_of(trainer_both)["base"] == completions_of(trainer_alone)["base"]
    assert completions_of(trainer_both)["adapter"] != completions_of(trainer_both)["base"]
    assert both["test/loss"] != alone["test/loss"]
    for key in ("rouge_l", "length_ratio", "eos_rate"):
        metric = next(name for name in both["completions"]["adapter"] if metric_name(name) == f"test/{key}")
        assert both[f"test/{key}"] == both["completions"]["adapter"][metric]["mean"], "logged is the adapter's"
    first_prompt = trainer_both.datamodule.prompt_batches("test", 1)[0].prompts
    assert model.generate(first_prompt) == completions_of(trainer_both)["adapter"][:1]


def test_metrics_of_a_checkpoint_are_written_beside_it(
    run_command: RunCommand, adapter_dir: Path, tmp_path: Path
) -> None:
    assert run_command() == 0
    assert run_command("--ckpt_path", str(adapter_dir)) == 0
    base, both = metrics_of(tmp_path / "runs" / "small" / "base"), metrics_of(adapter_dir)
    assert list(base["completions"]) == ["base", "copy_prompt", "nearest"]
    assert list(both["completions"]) == ["adapter", "base", "copy_prompt", "nearest"]
    assert both["completions"]["base"] == base["completions"]["base"]
    assert both["completions"]["adapter"] != base["completions"]["base"]


def test_zero_completions_measure_the_loss_only(
    run_command: RunCommand, prompts: list[list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reference: the loss of a run with completions."""
    folder = tmp_path / "runs" / "small" / "base"
    assert run_command("--max_completions", "2") == 0
    with_completions = metrics_of(folder)
    assert prompts
    prompts.clear()
    capsys.readouterr()
    assert run_command("--max_completions", "0") == 0
    assert prompts == []
    losses = {name: with_completions[name] for name in ("test/loss", "test/perplexity", "test/token_accuracy")}
    assert metrics_of(folder) == losses | {"completions": {}}
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(losses)


def test_two_completions_are_of_the_first_two_records(
    phi_dir: Path, scored_file: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    """Reference: a file with only these two."""
    first_two = tmp_path / "first.jsonl"
    first_two.write_text("".join(scored_file.read_text().splitlines(keepends=True)[:2]))
    run_test(tmp_path / "two", new_model(phi_dir), scored_file, scored_file, max_completions=2)
    assert len(prompts) == 2
    run_test(tmp_path / "file", new_model(phi_dir), scored_file, first_two)
    two, file = (metrics_of(tmp_path / name / "run" / "base") for name in ("two", "file"))
    assert two["completions"] == file["completions"]
    assert two["completions"]["base"]["ROUGE-L"]["records"] == 2
    assert two["completions"]["base"]["fact recall"]["records"] == 1
    assert two["test/loss"] != file["test/loss"], "the loss is that of all records"


def test_more_completions_than_records_are_one_per_record(phi_dir: Path, scored_file: Path, tmp_path: Path) -> None:
    run_test(tmp_path, new_model(phi_dir), scored_file, scored_file, max_completions=99)
    assert metrics_of(tmp_path / "run" / "base")["completions"]["base"]["ROUGE-L"]["records"] == 12


@pytest.mark.parametrize("limit", ["limit_test_batches=1", "fast_dev_run=true"])
def test_metrics_of_some_batches_never_replace_those_of_all(
    limit: str, run_command: RunCommand, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "small" / "base"
    assert run_command("--max_completions=0", "--data.packing=false") == 0
    whole = metrics_of(folder)
    assert run_command("--max_completions=0", "--data.packing=false", f"--trainer.{limit}") == 0
    assert metrics_of(folder) == whole
    partial = json.loads((folder / "test_metrics.partial.json").read_text())
    assert partial["test/loss"] != whole["test/loss"]
    assert "small/base/test_metrics.partial.json" in capsys.readouterr().err


def test_a_negative_number_of_completions_is_refused(
    run_command: RunCommand, phi_dir: Path, scored_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="--max_completions -1: is less than 0"):
        run_test(tmp_path, new_model(phi_dir), scored_file, scored_file, max_completions=-1)
    assert run_command("--max_completions", "-1") == 2
    assert "--max_completions -1: is less than 0" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_malformed_facts_stop_a_test_before_generation(
    run_command: RunCommand, prompts: list[list[int]], scored_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = scored_file.read_text().splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | {"facts": "CLM-12"})
    scored_file.write_text("\n".join(lines) + "\n")
    assert run_command() == 2
    assert f"{scored_file.name}:3: field 'facts' is text" in capsys.readouterr().err
    assert prompts == []
    assert run_command("--data.on_bad_record", "skip") == 0
    assert metrics_of(Path("runs/small/base"))["completions"]["base"]["ROUGE-L"]["records"] == 11


def test_facts_in_a_training_file_are_ignored(
    phi_dir: Path, scored_file: Path, record_rows: Rows, write_jsonl: Jsonl, tmp_path: Path
) -> None:
    train = write_jsonl([record | {"facts": "malformed"} for record in record_rows], "train.jsonl")
    data = new_data(phi_dir, train, max_length=400)
    data.setup("fit")
    assert len(data.splits["train"].records) == len(data.splits["val"].records) == 12
    run_test(tmp_path, new_model(phi_dir), train, scored_file)
    assert "nearest" in metrics_of(tmp_path / "run" / "base")["completions"]


def test_records_without_facts_get_every_other_metric(
    phi_dir: Path, record_rows: Rows, write_jsonl: Jsonl, tmp_path: Path
) -> None:
    path = write_jsonl(record_rows)
    run_test(tmp_path, new_model(phi_dir), path, path)
    rows = metrics_of(tmp_path / "run" / "base")["completions"]["base"]
    faults = ["empty", "echo", "unsupported amounts", "unsupported dates", "unsupported identifiers"]
    assert list(rows) == ["ROUGE-L", "chrF", "length ratio", "repeated 8-gram", *faults, "eos_rate"]


@pytest.mark.parametrize("content", [None, '{"instruction": "Why?"}\n'])
def test_without_training_records_nearest_is_left_out(
    content: str | None,
    phi_dir: Path,
    scored_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With a warning, and the rest as it is with them. The file is missing, or has no valid record."""
    train = tmp_path / "train.jsonl"
    if content is not None:
        train.write_text(content)
    run_test(tmp_path / "without", new_model(phi_dir), train, scored_file)
    warned = [line.getMessage() for line in caplog.records if line.levelno == logging.WARNING]
    assert any("nearest" in message and str(train) in message for message in warned)
    run_test(tmp_path / "with", new_model(phi_dir), scored_file, scored_file)
    without_train, with_train = (metrics_of(tmp_path / name / "run" / "base") for name in ("without", "with"))
    assert list(without_train["completions"]) == ["base", "copy_prompt"]
    del with_train["completions"]["nearest"]
    assert without_train == with_train


def test_a_missing_training_file_does_not_fail_the_command(
    run_command: RunCommand, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("--data.train_files", "nowhere.jsonl") == 0
    assert "left out of the baselines: nowhere.jsonl: no such file" in capsys.readouterr().err


def test_an_unwritable_folder_is_reported_before_generation(
    run_command: RunCommand, prompts: list[list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").write_text("a file")
    assert run_command() == 2
    assert "runs/small/base/test_metrics.json: cannot be written" in capsys.readouterr().err
    assert prompts == []


def test_completions_past_the_base_positions_are_refused(
    run_command: RunCommand, prompts: list[list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Before generation. The small base has 512 positions; the loss alone needs none for a completion."""
    assert run_command("--model.max_new_tokens", "500") == 2
    assert "model.max_new_tokens: 500 after the " in capsys.readouterr().err
    assert prompts == []
    assert run_command("--model.max_new_tokens", "500", "--max_completions", "0") == 0
