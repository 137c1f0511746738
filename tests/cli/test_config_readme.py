"""configs/README.md lists every key with its default and every flag; the parser is the reference."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_phi2.cli.app import TRAINER_DEFAULTS
from lit_phi2.cli.arguments import ALLOWED_CLASS_NAMES
from lit_phi2.cli.main import main
from lit_phi2.cli.subcommands import SUBCOMMANDS
from lit_phi2.training.trainer import Trainer

README = (Path(__file__).parents[2] / "configs" / "README.md").read_text("utf-8")
# | `key` | `default` | meaning |
DEFAULTS = {key: yaml.safe_load(value) for key, value in re.findall(r"(?m)^\| `([\w.]+)` \| `([^`]+)` \| \S", README)}


@pytest.fixture
def parser_defaults(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Every key of fit without a config, with dots; trainer is not entered."""
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", "--print_config"])
    assert exit_info.value.code == 0
    return dict(flatten(yaml.safe_load(capsys.readouterr().out)))


def flatten(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict) and key in ("model", "data", "checkpoint", "leakage"):
            yield from flatten(value, f"{key}.")
        elif key not in ("trainer", "ckpt_path"):
            yield prefix + key, value


def test_every_key_has_its_default_in_the_readme(parser_defaults: dict[str, Any]) -> None:
    assert {"run_name", "model.lora_r", "data.packing", "checkpoint.every_minutes"} < set(parser_defaults)
    documented = {key: value for key, value in DEFAULTS.items() if not key.startswith("trainer.")}
    assert documented == parser_defaults


def test_every_trainer_default_of_ours_is_in_the_readme() -> None:
    documented = {key: value for key, value in DEFAULTS.items() if key.startswith("trainer.")}
    assert documented == {f"trainer.{key}": value for key, value in TRAINER_DEFAULTS.items()}


@pytest.mark.parametrize("subcommand", SUBCOMMANDS)
def test_every_flag_of_a_subcommand_is_in_the_readme(subcommand: str) -> None:
    """Reference: the signature of the Trainer's method, from which the parser takes the flags."""
    flags = set(inspect.signature(getattr(Trainer, subcommand)).parameters) - {"self", "model", "datamodule"}
    assert set(re.findall(rf"(?m)^\| {subcommand} \| `--(\w+)` \|", README)) == flags


def test_every_allowed_class_is_in_the_readme() -> None:
    section = README.partition("## Classes in configs")[2].partition("##")[0]
    listed = re.findall(r"`(\w+)`[,.]", section)
    assert tuple(listed) == ALLOWED_CLASS_NAMES
