"""The first minutes: --help, --version, names of subcommands, and what is taken without a config."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest

import lit_phi2
from lit_phi2.cli.main import main
from lit_phi2.cli.subcommands import SUBCOMMANDS, program_help
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.training.module import LitPhi2
from lit_phi2.training.trainer import Trainer

LINKED = {"base", "max_new_tokens", "seed"}  # keys of the data that the model's set


def help_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("subcommand", SUBCOMMANDS)
def test_help_has_every_key_of_ours_on_one_screen(subcommand: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Reference: the signatures of the classes and of the subcommand's method."""
    text = help_of([subcommand, "--help"], capsys)
    assert len(text.splitlines()) <= 60
    assert max(map(len, text.splitlines())) <= 80
    keys = {*inspect.signature(LitPhi2.__init__).parameters} - {"self", "seed"}
    keys |= {*inspect.signature(ClaimsDataModule.__init__).parameters} - {"self", *LINKED}
    keys |= {*inspect.signature(getattr(Trainer, subcommand)).parameters} - {"self", "model", "datamodule"}
    keys |= {"run_name", "seed_everything", "checkpoint.every_n_steps", "checkpoint.every_minutes"}
    if subcommand == "audit":  # of no concern to the others
        keys |= {"leakage.max_auc", "leakage.max_exposure", "leakage.max_extracted"}
    entries = re.findall(r"(?m)^  ([\w.]+): (?:\S.*?)?(?:  +|$)(.*)", text)
    assert {key for key, _ in entries} == keys
    assert "lora_r: 2 " in text
    assert "target_modules: [Wqkv, fc1, fc2]" in text
    assert "required" in text or subcommand != "export"
    assert "--trainer." not in text


def test_help_trainer_has_every_key_of_lightning(capsys: pytest.CaptureFixture[str]) -> None:
    """Reference: the signature of Lightning's Trainer."""
    text = help_of(["predict", "--config", "tiny.yaml", "--help.trainer"], capsys)
    for key in list(inspect.signature(pl.Trainer.__init__).parameters)[1:]:
        assert f"--trainer.{key} " in text
    assert "--model.lora_r" not in text


def test_help_of_a_section_has_the_whole_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(help_of(["fit", "--help.model"], capsys).split())
    assert "recomputed in backward" in text
    assert "--trainer." not in text
    assert main(["fit", "--help.modell"]) == 2
    assert "--help.model, --help.data, --help.trainer" in capsys.readouterr().err


def test_program_help_has_a_line_for_each_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    """Reference: the docstrings of the Trainer's methods."""
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert text == program_help() + "\n"
    assert max(map(len, text.splitlines())) <= 80
    for name, meaning in SUBCOMMANDS.items():
        assert meaning == (inspect.getdoc(getattr(Trainer, name)) or "").partition("\n\n")[0]
        assert f"{name} {meaning}" in " ".join(text.split())


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("train", "fit"),
        ("finetune", "fit"),
        ("generate", "predict"),
        ("eval", "validate or test"),
        ("predcit", "predict"),
        ("EXPORT", "export"),
    ],
)
def test_an_unknown_subcommand_names_the_nearest(name: str, nearest: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "tiny.yaml", name, "--model.lora_r", "2"]) == 2
    assert f"{name!r} is no subcommand. Did you mean {nearest}? Subcommands: fit, " in capsys.readouterr().err


def test_a_missing_subcommand_is_an_error_that_helps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "a subcommand is missing" in capsys.readouterr().err
    assert main(["--trainer.max_steps", "2", "fit"]) == 2
    assert "the subcommand comes first, as in: lit-phi2 fit --trainer.max_steps" in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["--version", "--help", "train"])
def test_version_help_and_a_typo_need_no_torch(argument: str) -> None:
    program = "import sys; from lit_phi2.cli.main import main; main(sys.argv[1:]); print(*sys.modules)"
    command = [sys.executable, "-c", program, argument]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = {"torch", "lightning", "jsonargparse", "transformers", "torchmetrics", "matplotlib"}
    assert not loaded & set(process.stdout.split())
    if argument == "--version":
        assert process.stdout.startswith(f"lit-phi2 {lit_phi2.__version__}\n")


def test_without_a_config_base_and_records_are_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The records are missing, so nothing is read after the line."""
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--data.train_files", "mine.jsonl"]) == 2
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("without --config"))
    for value in (
        "model.base tiny",
        "data.train_files mine.jsonl",
        "data.val_files claims:validation",
        "--config FILE",
    ):
        assert value in line
    assert main(["predict", "--data.predict_files", "mine.jsonl"]) == 2
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("without --config"))
    assert "data.predict_files mine.jsonl" in line
    assert "train_files" not in line
    (tmp_path / "a.yaml").write_text("data: {predict_files: mine.jsonl}\n")
    assert main(["predict", "--config", "a.yaml"]) == 2
    assert "without --config" not in capsys.readouterr().err


def test_help_can_be_piped_into_head() -> None:
    command = f"{sys.executable} -m lit_phi2 fit --help.trainer | head -1"
    process = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert len(process.stdout.splitlines()) == 1
    assert process.stderr == ""
