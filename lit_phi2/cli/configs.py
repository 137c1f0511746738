"""Configs: the YAML files that a command line names, found, loaded and checked key by key.

    tiny.yaml  ->  <package>/configs/tiny.yaml  ->  {"model": {"lora_r": 16}, ...}
    data: {...}  and later  data: {...}         ->  InputError with both lines

PyYAML keeps the last of two equal keys, so a section given twice would lose everything in its first half.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import _util, get_loader

from lit_phi2.cli.messages import did_you_mean
from lit_phi2.errors import InputError
from lit_phi2.utils.paths import expand_user

CONFIG_SECTIONS = ("model", "data", "trainer", "checkpoint", "leakage")


class DuplicateKeyError(yaml.YAMLError):
    """A key is in one mapping twice; the message has the key and both lines."""


class UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which also refuses a key that is in one mapping twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # <<: *defaults; several add up
                continue
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not isinstance(key, str | int | float | bool | None):
                continue  # PyYAML's own error follows
            if key in lines:
                where = f"in line {line}" if lines[key] == line else f"in line {lines[key]} and in line {line}"
                raise DuplicateKeyError(
                    f"{key!r} is given twice, {where}, and the second would replace the first. Join them into one."
                )
            lines[key] = line
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """Load YAML in which no key is given twice.

    Raises:
        DuplicateKeyError: a key is given twice.
        yaml.YAMLError: the text is not YAML.
    """
    return yaml.load(text, Loader=UniqueKeyLoader)


def load_value(text: str) -> Any:
    """What jsonargparse loads with: its own loader (1e-3 is a number), which sees no key twice.

    Raises:
        InputError: a key is given twice. No YAMLError, after which jsonargparse tries to read the text as another type.
        yaml.YAMLError: the text is not YAML.
    """
    try:
        load_yaml(text)
    except DuplicateKeyError as error:
        raise InputError(f"{_current_file()}{error}") from error
    return get_loader("yaml")(text)


def _current_file() -> str:
    """`path: ` of the config inside a config, or after a flag such as --data, that jsonargparse is reading."""
    stack = getattr(_util, "config_load_stack", None)  # private: without it, only the path is missing
    files = stack.get() if stack is not None else ()
    return f"{files[-1][0]}: " if files else ""


def resolve_config(path: str) -> str:
    """The path of a config; `tiny.yaml` and `configs/tiny.yaml` are the packaged file if no such file exists."""
    found = expand_user(path, "--config")
    if path and not found.exists():
        for config in packaged_configs():
            if config.name == found.name and found.parent.name in ("", "configs"):
                return str(config)
    return str(found) if path else path


def packaged_configs() -> list[Path]:
    """The configs that come with lit_phi2: inside the installed package, or beside it in a clone."""
    package = Path(__file__).parents[1]
    folders = (package / "configs", package.parent / "configs")
    return sorted(next((folder for folder in folders if folder.is_dir()), package).glob("*.yaml"))


def check_config(path: str, known: Sequence[str]) -> None:
    """Refuse a config file that cannot be read, or that has an unknown key or a key twice.

    Raises:
        InputError: names the file, the key and the nearest known key, or both lines.
    """
    keys = list(flatten_keys(read_config(path)))
    for key in keys:
        if key in CONFIG_SECTIONS:
            raise InputError(f"{path}: section {key!r} has no keys; give it at least one, or remove it.")
        below_known = any(key.startswith(f"{name}.") for name in known if name not in CONFIG_SECTIONS)
        if key not in known and not below_known:
            raise InputError(f"{path}: unknown key {key!r}.{did_you_mean(key, known)}")
        if keys.count(key) > 1:
            raise InputError(f"{path}: {key!r} is given twice, in its section and with a dot. Join them into one.")


def read_config(path: str) -> dict[Any, Any]:
    """The content of a config file.

    Raises:
        InputError: it is missing, is not YAML, has a key twice, or has no keys.
    """
    if not path:
        raise InputError("--config: the file is missing.")
    if not Path(path).is_file():
        names = ", ".join(config.name for config in packaged_configs())
        raise InputError(f"--config {path}: no such file. Packaged: {names}")
    try:
        content = load_yaml(Path(path).read_text("utf-8"))
    except DuplicateKeyError as error:
        raise InputError(f"{path}: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: has no keys; expected sections such as model:, data: and trainer:.")
    return content


def flatten_keys(content: dict[Any, Any], prefix: str = "") -> Iterator[str]:
    """The keys of a config with dots; a value other than a section is not entered.

    >>> list(flatten_keys({"model": {"base": "tiny"}, "run_name": "a", "trainer": {"logger": {"class_path": "b"}}}))
    ['model.base', 'run_name', 'trainer.logger']
    """
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name in CONFIG_SECTIONS:
            yield from flatten_keys(value, f"{name}.")
        else:
            yield name


def config_setting(message: str, configs: Sequence[str], arguments: Sequence[str]) -> str:
    """`path: ` of the config that set the key in a message, as its prefix; empty if a flag set the key."""
    match = re.search(r'key "([\w.]+)"', message)
    if match is None or any(argument.partition("=")[0] == f"--{match[1]}" for argument in arguments):
        return ""
    for config in reversed(configs):
        if match[1] in flatten_keys(read_config(config)):
            return f"{config}: "
    return ""
