"""Help: what --help and --help.SECTION print of a subcommand.

    fit --help           every key of ours with its default and its meaning, on one screen
    fit --help.trainer   the keys of Lightning's Trainer, in full; --help.model and --help.data in full, too

The meaning of a key is in the docstring of its class: up to the first semicolon or full stop on the screen, all of it
in a section.
"""

import argparse
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from lit_phi2.cli.configs import CONFIG_SECTIONS
from lit_phi2.cli.messages import did_you_mean
from lit_phi2.errors import InputError

SECTIONS = ("model", "data", "trainer")
LEAKAGE_HELP = {
    "max_auc": "AUC of train against val; by the lower end of its interval. 0.5 is chance.",
    "max_exposure": "bits, of canaries; by the lower end of the interval of their mean. 1.44 is chance.",
    "max_extracted": "share of canaries or identifiers; the latter by the lower end of the interval.",
}
_WIDTH = 80
_LEFT = 37  # columns of a key and its default
_USAGE = """\
usage: lit-phi2 {subcommand} [--config FILE ...] [--KEY VALUE ...]

{description}
A key is a flag, as in --model.lora_r 8, or in a YAML file: model: {{lora_r: 8}}.
"""
_MORE = """
--help.model, --help.data, --help.trainer (max_epochs ...) print all of these."""


def requested_help(parser: Any, subcommand: str, arguments: Sequence[str]) -> str | None:
    """The help that the arguments of a subcommand ask for; None if they ask for none.

    Raises:
        InputError: --help.SECTION names no section.
    """
    for argument in arguments:
        if argument in ("-h", "--help"):
            return short_help(parser, subcommand)
        if argument.startswith("--help."):
            section = argument.removeprefix("--help.")
            if section not in SECTIONS:
                expected = ", ".join(f"--help.{name}" for name in SECTIONS)
                raise InputError(
                    f"{argument}: unknown.{did_you_mean(section, SECTIONS)} Expected --help or {expected}."
                )
            return section_help(parser, section)
    return None


def short_help(parser: Any, subcommand: str) -> str:
    """Every key of a subcommand but Lightning's, by section."""
    sections: dict[str, list[str]] = {f"flags of {subcommand}": [], "the run": [], "model": [], "data": []}
    for action in _own_actions(parser, subcommand):
        section, _, key = action.dest.rpartition(".")
        if section in ("model", "data"):
            sections[section] += _entry(key, action)
        else:
            is_flag = section == "" and action.dest not in ("run_name", "seed_everything")
            sections[f"flags of {subcommand}" if is_flag else "the run"] += _entry(action.dest, action)
    text = _USAGE.format(subcommand=subcommand, description="\n".join(textwrap.wrap(parser.description, _WIDTH)))
    text += "\n"
    for title, lines in sections.items():  # no empty lines between them: all keys fit one screen
        if lines:
            text += "\n".join([f"{title}:", *lines, ""])
    return text + _MORE


def _own_actions(parser: Any, subcommand: str) -> Iterator[argparse.Action]:
    """The actions of our keys, without the limits of the leakage audit for a subcommand that they do not concern."""
    for action in parser._actions:
        names_key = f"--{action.dest}" in action.option_strings
        is_other = action.dest in (*CONFIG_SECTIONS, "help", "config", "print_config")
        is_other |= action.dest.startswith("leakage.") and subcommand != "audit"
        if names_key and not is_other and not action.dest.startswith("trainer."):
            yield action


def _entry(key: str, action: argparse.Action) -> list[str]:
    """The lines of a key: `lora_r: 2`, then its meaning."""
    default = "required" if action.required else _to_yaml(action.default)
    left = f"  {key}: {default}"
    meaning = textwrap.wrap(re.split(r"; |\. |\.$", action.help or "")[0], _WIDTH - _LEFT)
    if len(left) >= _LEFT:
        return [left, *(" " * _LEFT + line for line in meaning)]
    return [f"{left:{_LEFT}}{meaning[0]}", *(" " * _LEFT + line for line in meaning[1:])]


def _to_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()


def section_help(parser: Any, section: str) -> str:
    """The part of jsonargparse's help that has the keys of a section."""
    title = parser.groups[section].title
    parts = re.split(r"\n\n(?=\S)", parser.format_help())
    return next(part for part in parts if part.startswith(f"{title}:"))
