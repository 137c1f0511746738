"""Arguments: the command line as jsonargparse reads it, and the config files that it names.

    fit --model.lora_r 8 --config tiny.yaml --allow_classes a.B
      -> fit --config <package>/configs/tiny.yaml --model.lora_r 8      and the classes [a.B]

jsonargparse lets the later argument win, so configs come first and flags win wherever the user typed them.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import set_parsing_settings
from lightning.pytorch import callbacks, loggers, profilers

from lit_phi2.cli.messages import did_you_mean
from lit_phi2.errors import InputError

CONFIG_SECTIONS = ("model", "data", "trainer", "checkpoint")

# Classes that a config may name: none of them runs code passed to it or sends anything. --allow_classes adds to them.
ALLOWED_CLASSES = (
    callbacks.DeviceStatsMonitor,
    callbacks.EarlyStopping,
    callbacks.LearningRateMonitor,
    callbacks.ModelCheckpoint,  # allowed here so that checks.py can refuse it with the reason
    callbacks.ModelSummary,
    callbacks.Timer,
    loggers.CSVLogger,
    loggers.TensorBoardLogger,
    profilers.AdvancedProfiler,
    profilers.PyTorchProfiler,
    profilers.SimpleProfiler,
)
ALLOWED_CLASS_NAMES = tuple(c.__name__ for c in ALLOWED_CLASSES if not issubclass(c, callbacks.Checkpoint))


def configs_first(arguments: Sequence[str]) -> list[str]:
    """The subcommand, then the configs in their order, then the flags.

    >>> configs_first(["fit", "--model.lora_r", "8", "--config", "a.yaml", "-c=b.yaml"])
    ['fit', '--config', 'a.yaml', '--config', 'b.yaml', '--model.lora_r', '8']
    """
    configs, rest = _pop_option(arguments, "--config", "-c")
    flags = [part for config in configs for part in ("--config", resolve_config(config))]
    return rest[:1] + flags + rest[1:]


def pop_allow_classes(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments without --allow_classes, and the classes it names.

    It is not a key of the parser, so that no config can extend what configs may name.

    >>> pop_allow_classes(["fit", "--allow_classes", "a.B,c.D", "--config", "x.yaml"])
    (['fit', '--config', 'x.yaml'], ['a.B', 'c.D'])
    """
    values, rest = _pop_option(arguments, "--allow_classes")
    return rest, [name for value in values for name in value.split(",")]


def _pop_option(arguments: Sequence[str], *names: str) -> tuple[list[str], list[str]]:
    """The values of an option, given as `--name value` or `--name=value`, and the arguments without it."""
    values: list[str] = []
    rest: list[str] = []
    iterator = iter(arguments)
    for argument in iterator:
        name, equals, value = argument.partition("=")
        if name in names:
            values.append(value if equals else next(iterator, ""))
        else:
            rest.append(argument)
    return values, rest


@contextmanager
def classes_allowed(classes: Sequence[str]) -> Iterator[None]:
    """Let configs name these classes and ALLOWED_CLASSES, and nothing else that could be imported.

    jsonargparse keeps what is allowed for the whole process, so it is withdrawn at the end.

    Raises:
        InputError: one of them is not the dotted path of a class.
    """
    defined = [f"{cls.__module__}.{cls.__qualname__}" for cls in ALLOWED_CLASSES]
    packages = [f"lightning.pytorch.{kind}" for kind in ("callbacks", "loggers", "profilers")]
    public = [f"{name}.{path.rpartition('.')[2]}" for path in defined for name in packages if path.startswith(name)]
    allowed = ["lit_phi2", *defined, *public, *classes]
    try:
        set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=allowed)
    except ValueError as error:
        raise InputError(f"--allow_classes {','.join(classes)}: {error}") from error
    try:
        yield
    finally:
        set_parsing_settings(import_path_denylist=["*", *allowed])


def resolve_config(path: str) -> str:
    """The path of a config; `tiny.yaml` and `configs/tiny.yaml` are the packaged file if no such file exists."""
    if path and not Path(path).exists():
        for config in packaged_configs():
            if config.name == Path(path).name and Path(path).parent.name in ("", "configs"):
                return str(config)
    return path


def packaged_configs() -> list[Path]:
    """The configs that come with lit_phi2: inside the installed package, or beside it in a clone."""
    package = Path(__file__).parents[1]
    folders = (package / "configs", package.parent / "configs")
    return sorted(next((folder for folder in folders if folder.is_dir()), package).glob("*.yaml"))


def known_keys(parser: Any) -> list[str]:
    """Every key that a config of this parser may have, with dots."""
    return [action.dest for action in parser._actions if action.dest not in ("help", "print_config")]


def check_config(path: str, known: Sequence[str]) -> None:
    """Refuse a config file that cannot be read, or that has an unknown key.

    Raises:
        InputError: names the file, the key and the nearest known key.
    """
    if not Path(path).is_file():
        names = ", ".join(config.name for config in packaged_configs())
        raise InputError(f"--config {path}: no such file. Packaged: {names}")
    try:
        content = yaml.safe_load(Path(path).read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: has no keys; expected sections such as model:, data: and trainer:.")
    for key in flatten_keys(content):
        if key in CONFIG_SECTIONS:
            raise InputError(f"{path}: section {key!r} has no keys; give it at least one, or remove it.")
        below_known = any(key.startswith(f"{name}.") for name in known if name not in CONFIG_SECTIONS)
        if key not in known and not below_known:
            raise InputError(f"{path}: unknown key {key!r}.{did_you_mean(key, known)}")


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
        if match[1] in flatten_keys(yaml.safe_load(Path(config).read_text("utf-8"))):
            return f"{config}: "
    return ""
