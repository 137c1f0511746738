"""Flags: each once, paths with ~, and the classes that a config may name."""

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lit_phi2.cli.main import main

Fit = Callable[..., int]
NO_USER = "~no_such_user_of_this_machine"


@pytest.mark.parametrize("second", [["--data.train_files", "b.jsonl"], ["--data.train_files=b.jsonl"]])
def test_a_list_flag_given_twice_names_the_list(second: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--data.train_files", "a c.jsonl", "--config", "tiny.yaml", *second]) == 2
    error = capsys.readouterr().err
    assert "--data.train_files is given twice, as a c.jsonl and as b.jsonl" in error
    assert error.rstrip().endswith("To give all: --data.train_files '[a c.jsonl, b.jsonl]'")


def test_the_list_in_the_message_gives_all_values(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data.train_files", "['a, b.jsonl', c.jsonl]", "--data.train_files", "d.jsonl"]
    assert main(["fit", *flags]) == 2
    advice = capsys.readouterr().err.partition("To give all: ")[2]
    flag, value = shlex.split(advice)
    assert flag == "--data.train_files"
    assert yaml.safe_load(value) == ["a, b.jsonl", "c.jsonl", "d.jsonl"]


@pytest.mark.parametrize("flags", [["--model.lora_r", "4", "--model.lora_r=8"], ["--run_name=4", "--run_name", "8"]])
def test_another_flag_given_twice_is_an_error_too(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *flags]) == 2
    assert f"{flags[0].partition('=')[0]} is given twice, as 4 and as 8" in capsys.readouterr().err


def test_appending_flags_and_configs_may_repeat(fit: Fit, tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text("trainer: {max_steps: 1}\n")
    flags = ["--data.train_files+", "records.jsonl", "--data.train_files+", "records.jsonl"]
    assert fit("--config", "two.yaml", "--config", "two.yaml", *flags) == 0
    saved = yaml.safe_load(Path("runs/two/version_0/config.yaml").read_text())
    assert [Path(file).name for file in saved["data"]["train_files"]] == ["records.jsonl"] * 3


def test_an_abbreviated_flag_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    """An abbreviated --config would be read without the checks of its keys."""
    assert main(["fit", "--conf", "tiny.yaml"]) == 2
    assert "unrecognized arguments: --conf tiny.yaml. Did you mean 'config'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["fit", f"--config={NO_USER}/a.yaml"],
        ["fit", f"--model.base={NO_USER}/phi-2"],
        ["fit", f"--model.adapter={NO_USER}/run"],
        ["fit", f"--data.train_files={NO_USER}/a.jsonl"],
        ["fit", f"--data.val_files=[{NO_USER}/a.jsonl]"],
        ["inspect", f"--data.cache_dir={NO_USER}/cache"],
        ["fit", f"--trainer.default_root_dir={NO_USER}/runs"],
        ["validate", f"--ckpt_path={NO_USER}/run"],
        ["predict", f"--output={NO_USER}/a.jsonl"],
        ["export", f"--output_dir={NO_USER}/adapter", "--ckpt_path=last", "--run_name=small"],
    ],
    ids=lambda arguments: arguments[1].partition("=")[0],
)
def test_the_home_of_an_unknown_user_is_an_error(
    arguments: list[str], fit: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    if arguments[0] == "export":
        assert fit("--trainer.max_steps", "1") == 0
        arguments = [*arguments, "--config", "small.yaml"]
    assert main(arguments) == 2
    setting = arguments[1].partition("=")[0]
    error = capsys.readouterr().err
    assert f"{setting if setting in ('--config', '--ckpt_path', '--output') else setting.removeprefix('--')}" in error
    assert NO_USER in error
    assert "begins with the home folder of a user that this machine does not have" in error


def test_a_tilde_is_the_home_folder_in_every_path(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves the ~ of --output=~/a alone."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    Path("small.yaml").rename(home / "small.yaml")
    Path("records.jsonl").rename(home / "records.jsonl")
    files = [f"--data.{name}_files=~/records.jsonl" for name in ("train", "val", "predict")]
    common = ["--config=~/small.yaml", *files, "--trainer.default_root_dir=~/runs", "--data.cache_dir=~/cache"]
    assert main(["fit", *common, "--trainer.max_steps=1"]) == 0
    run = "~/runs/small/version_0"
    assert main(["predict", *common, f"--ckpt_path={run}", "--output=~/out/a.jsonl"]) == 0
    assert main(["export", *common, f"--ckpt_path={run}/checkpoints/last.ckpt", "--output_dir=~/adapter"]) == 0
    assert main(["fit", *common, f"--model.adapter={run}", "--run_name=b", "--trainer.max_steps=1"]) == 0
    for path in ("runs/small/version_0", "out/a.jsonl", "adapter/adapter_config.json", "runs/b/version_0"):
        assert (home / path).exists()
    assert not Path("~").exists()


def test_a_config_may_name_no_class_of_lit_phi2(fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = tmp_path / "elsewhere"
    writer = {"class_path": "lit_phi2.training.callbacks.samples.SampleWriter", "init_args": {"folder": str(elsewhere)}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [writer]}}))
    assert fit("--config", "own.yaml", "--run_name", "small") == 2
    assert 'own.yaml: key "trainer.callbacks": names lit_phi2.training.' in capsys.readouterr().err
    assert not elsewhere.exists()
    assert not Path("runs").exists()


def test_no_value_of_a_config_is_fetched(fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """memory:// is a file system of fsspec, as http:// and s3:// are."""
    import fsspec

    with fsspec.open("memory://callbacks.yaml", "w") as file:
        file.write("[{class_path: EarlyStopping, init_args: {monitor: val/loss}}]")
    (tmp_path / "url.yaml").write_text("trainer: {callbacks: 'memory://callbacks.yaml'}\n")
    assert fit("--config", "url.yaml") == 2
    assert 'key "trainer.callbacks": Expected one of list[Callback]' in capsys.readouterr().err
