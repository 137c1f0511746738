"""A config gives every key once, and says where one is given again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lit_phi2.cli.configs import DuplicateKeyError, load_yaml
from lit_phi2.cli.main import main

SECTION_TWICE = """\
model: {base: tiny, lora_r: 4}
data: {train_files: records.jsonl, val_files: null}
trainer: {max_steps: 2}
data: {batch_size: 2}
"""
IN_A_CALLBACK = """\
trainer:
  callbacks:
    - class_path: EarlyStopping
      init_args:
        monitor: val/loss
        patience: 3
        monitor: val/perplexity
"""


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        (SECTION_TWICE, "data", (2, 4)),
        (IN_A_CALLBACK, "monitor", (5, 7)),
        ("model:\n  lora_r: 4\n  'lora_r': 5\n", "lora_r", (2, 3)),  # quoted, it is the same key
        ("run_name: a\n# a comment\nrun_name: a\n", "run_name", (1, 3)),  # also if the values are the same
        ("trainer: {max_time: {hours: 1, hours: 2}}\n", "hours", (1, 1)),
    ],
)
def test_a_key_given_twice_is_an_error_with_both_lines(
    text: str, key: str, lines: tuple[int, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "twice.yaml"
    config.write_text(text)
    assert main(["fit", "--config", str(config)]) == 2
    first, second = lines
    where = f"in line {first}" if first == second else f"in line {first} and in line {second}"
    assert f"{config}: {key!r} is given twice, {where}" in capsys.readouterr().err


def test_a_key_in_its_section_and_with_a_dot_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "twice.yaml"
    config.write_text("model: {lora_r: 4}\nmodel.lora_r: 5\n")
    assert main(["fit", "--config", str(config)]) == 2
    assert "'model.lora_r' is given twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "arguments"),
    [
        ("data.yaml", "batch_size: 2\nbatch_size: 3\n", ["--data", "data.yaml"]),
        ("callback.yaml", "class_path: Timer\nclass_path: EarlyStopping\n", ["--trainer.callbacks", "callback.yaml"]),
        ("callback.yaml", "class_path: Timer\nclass_path: EarlyStopping\n", ["--config", "outer.yaml"]),
    ],
)
def test_a_config_inside_a_config_gives_keys_once(
    name: str,
    content: str,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(content)
    Path("outer.yaml").write_text("trainer:\n  callbacks: callback.yaml\n")
    assert main(["inspect", *arguments]) == 2
    assert f"{name}: {content.partition(':')[0]!r} is given twice, in line 1 and in line 2" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--data", "--trainer.logger", "--trainer.callbacks"])
def test_a_value_of_a_flag_gives_keys_once(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", flag, "{batch_size: 2, batch_size: 3}"]) == 2
    assert "'batch_size' is given twice" in capsys.readouterr().err


def test_merge_keys_may_override_what_they_merge() -> None:
    """Reference: PyYAML's own loader."""
    text = "a: &a {r: 1, s: 2}\nb: &b {t: 3}\nc:\n  <<: *a\n  <<: *b\n  r: 4\nd: {<<: [*a, *b], s: 5}\n"
    assert load_yaml(text) == yaml.safe_load(text)
    with pytest.raises(DuplicateKeyError, match="'r' is given twice, in line 4 and in line 5"):
        load_yaml("a: &a {r: 1}\nc:\n  <<: *a\n  r: 2\n  r: 3\n")


def test_a_config_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    """Reference: the text in the file, with the escapes that a stdout in ASCII gets."""
    (tmp_path / "a.yaml").write_text("data: {instruction_field: Größe}\n", "utf-8")
    command = [sys.executable, "-m", "lit_phi2", "inspect", "--config", "a.yaml", "--print_config"]
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    process = subprocess.run(command, cwd=tmp_path, env=os.environ | locale, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "instruction_field: Gr\\xf6\\xdfe" in process.stdout
