"""cli/messages.py."""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import callbacks

from lit_phi2.cli.arguments import ALLOWED_CLASSES, packaged_configs
from lit_phi2.errors import InputError


def known_keys(parser: Any) -> list[str]:
    """Every key that a config of this parser may have, with dots."""
    return [action.dest for action in parser._actions if action.dest not in ("help", "print_config")]


def check_config(path: str, known: Sequence[str]) -> None:
    """Refuse a config file that cannot be read, or a key that means nothing.

    Raises:
        InputError: names the file, the key and the nearest right one.
    """
    if not Path(path).is_file():
        raise InputError(f"--config {path}: no such file. Packaged: " + ", ".join(f.name for f in packaged_configs()))
    try:
        content = yaml.safe_load(Path(path).read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no keys; expected sections such as model:, data: and trainer:.")
    for key in flatten_keys(content):
        if key in CONFIG_SECTIONS:
            raise InputError(f"{path}: section {key!r} holds no keys; expected some below it, or leave it out.")
        if key not in known and not any(key.startswith(f"{name}.") for name in known if name not in CONFIG_SECTIONS):
            raise InputError(f"{path}: unknown key {key!r}.{did_you_mean(key, known)}")


CONFIG_SECTIONS = ("model", "data", "trainer", "checkpoint")


def flatten_keys(content: dict[Any, Any], prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name in CONFIG_SECTIONS:
            yield from flatten_keys(value, f"{name}.")
        else:
            yield name


def did_you_mean(key: str, known: Sequence[str]) -> str:
    """A hint: the nearest key, also if only the section is wrong or missing."""
    last = key.rpartition(".")[2]
    matches = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    same_name = [name for name in known if name.rpartition(".")[2] == last]
    if nearest := (same_name or matches):
        return f" Did you mean {nearest[0]!r}?"
    return ""


def humanize_parser_error(message: str, known: Sequence[str]) -> str:
    """jsonargparse's message without its own vocabulary, and with the nearest key."""
    if match := re.search(r"(?s)(?:Parser key (\S+):)?.*Importing '([\w.]+)' is not allowed", message):
        names = ", ".join(c.__name__ for c in ALLOWED_CLASSES if not issubclass(c, callbacks.Checkpoint))
        return (
            f"key {match[1]}: names {match[2]}, and a config may name only {names}, so that none can run code. If you "
            f"trust it: --allow_classes {match[2]}"
        )
    message = message.replace("Parser key ", "key ").replace("Validation failed: ", "")
    message = re.sub(r"(a )?<class '([\w.]+)'>", r"\2", message).replace("NoneType", "null")
    union = r"Does not validate[^\[]*\[(.*)\](?s:.*?)Given value: "
    message = re.sub(union, r"Expected one of \1. Got value: ", message)
    if match := re.search(r"unrecognized arguments: (\S+\.ya?ml)", message):
        return f"{message}. Did you mean --config {match[1]}?"
    if re.search(r"unrecognized arguments: [^-]", message):
        return f"{message}. Several values of one key are given as a list: '[a, b]'."
    if match := re.search(r"unrecognized arguments: --([\w.]+)", message):
        return f"{message}.{did_you_mean(match[1], known)}"
    return message


def config_setting(message: str, configs: Sequence[str], arguments: Sequence[str]) -> str:
    """The config that set the key a message names, to stand before it; nothing where a flag set it."""
    match = re.search(r'key "([\w.]+)"', message)
    if match is None or any(argument.partition("=")[0] == f"--{match[1]}" for argument in arguments):
        return ""
    for config in reversed(configs):
        if match[1] in flatten_keys(yaml.safe_load(Path(config).read_text("utf-8"))):
            return f"{config}: "
    return ""
