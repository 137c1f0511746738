"""Arguments: the command line as jsonargparse reads it, each flag once, and the classes that configs may name.

    fit --model.lora_r 8 --config tiny.yaml --allow_classes a.B
      -> fit --config <package>/configs/tiny.yaml --model.lora_r 8      and the classes [a.B]

jsonargparse lets the later argument win, so configs come first and flags win wherever the user typed them. Of a flag
that is given twice it would drop the first.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import yaml
from jsonargparse import set_parsing_settings
from lightning.pytorch import callbacks, loggers, profilers

from lit_phi2.cli.configs import CONFIG_SECTIONS, resolve_config
from lit_phi2.cli.subcommands import pop_option
from lit_phi2.errors import InputError
from lit_phi2.utils.console import shell_command
from lit_phi2.utils.paths import expand_user, run_dir_of

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

OF_ONE_RUN = ("verify", "report")  # subcommands that take the config of the run by default


def configs_first(arguments: Sequence[str]) -> list[str]:
    """The subcommand, then the configs in their order, then the flags.

    >>> configs_first(["fit", "--model.lora_r", "8", "--config", "a.yaml", "-c=b.yaml"])
    ['fit', '--config', 'a.yaml', '--config', 'b.yaml', '--model.lora_r', '8']
    """
    configs, rest = pop_option(arguments, "--config", "-c")
    flags = [part for config in configs for part in ("--config", resolve_config(config))]
    return rest[:1] + flags + rest[1:]


def with_run_config(arguments: Sequence[str]) -> list[str]:
    """The arguments of verify and report, with the config of the run that --ckpt_path is in, unless a config is given.

    Args:
        arguments: after `configs_first`.
    """
    values, _ = pop_option(arguments, "--ckpt_path")
    if arguments[0] not in OF_ONE_RUN or "--config" in arguments or not values or values[-1] in ("last", "best"):
        return list(arguments)
    path = expand_user(values[-1], "--ckpt_path")
    folders = [path, run_dir_of(path)] if path.exists() else []
    configs = [str(file) for folder in folders if (file := folder / "config.yaml").is_file()]
    return [arguments[0], *(["--config", configs[0]] if configs else []), *arguments[1:]]


def pop_allow_classes(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments without --allow_classes, and the classes it names.

    It is not a key of the parser, so that no config can extend what configs may name.

    >>> pop_allow_classes(["fit", "--allow_classes", "a.B,c.D", "--config", "x.yaml"])
    (['fit', '--config', 'x.yaml'], ['a.B', 'c.D'])
    """
    values, rest = pop_option(arguments, "--allow_classes")
    return rest, [name for value in values for name in value.split(",")]


def known_keys(parser: Any) -> list[str]:
    """Every key that a config of this parser may have, with dots."""
    return [action.dest for action in parser._actions if action.dest not in ("help", "print_config")]


def list_keys(parser: Any) -> list[str]:
    """The keys whose value may be a list."""
    return [action.dest for action in parser._actions if f"--{action.dest}+" in action.option_strings]


def check_repeated(arguments: Sequence[str], known: Sequence[str], lists: Sequence[str]) -> None:
    """Refuse a flag that is given twice; --KEY+, which appends, may be.

    Args:
        arguments: of the command line.
        known: the keys of the parser.
        lists: those whose value may be a list.

    Raises:
        InputError: names the flag, its values and, for a list, how to give them all.
    """
    values: dict[str, list[str]] = {}
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, equals, value = argument.partition("=")
        key = flag.removeprefix("--")
        if flag != key and key in known and key not in ("config", *CONFIG_SECTIONS):
            values.setdefault(key, []).append(value if equals else following)
    for key, given in values.items():
        if len(given) > 1:
            times = "twice" if len(given) == 2 else f"{len(given)} times"
            problem = f"--{key} is given {times}, as {' and as '.join(given)}; only the last would count."
            cure = f"To give all: {_list_flag(key, given)}" if key in lists else "Leave out all but one."
            raise InputError(f"{problem} {cure}")


def check_question(arguments: Sequence[str]) -> None:
    """Refuse flags of predict that contradict --instruction or --input.

    Args:
        arguments: of the command line.

    Raises:
        InputError: names the flags.
    """
    flags = dict(_flag_value(pair) for pair in zip(arguments, [*arguments[1:], ""], strict=True))
    if "--instruction" not in flags:
        if "--input" in flags:
            raise InputError("--input: is the document of an --instruction, which is missing.")
        return
    if not flags["--instruction"].strip():
        raise InputError("--instruction: is empty; expected a question or a task.")
    if "--data.predict_files" in flags:
        raise InputError("--instruction and --data.predict_files: one completes a question, the other files. Give one.")
    if "--output" in flags:
        raise InputError("--output: has no effect with --instruction, whose completion is printed. Append > FILE.")


def _flag_value(pair: tuple[str, str]) -> tuple[str, str]:
    """The name and value of a flag, from an argument and the one after it."""
    name, equals, value = pair[0].partition("=")
    return name, value if equals else pair[1]


def _list_flag(key: str, values: Sequence[str]) -> str:
    """The flag that gives several values at once, quoted for a shell.

    >>> _list_flag("data.train_files", ["a.jsonl", "[b.jsonl, my records.jsonl]"])
    "--data.train_files '[a.jsonl, b.jsonl, my records.jsonl]'"
    """
    items: list[Any] = []
    for value in values:
        loaded = yaml.safe_load(value) if value.startswith("[") else value
        items += loaded if isinstance(loaded, list) else [value]
    return shell_command(f"--{key}", yaml.safe_dump(items, default_flow_style=True, width=10**6).strip())


@contextmanager
def classes_allowed(classes: Sequence[str]) -> Iterator[None]:
    """Let configs name these classes and ALLOWED_CLASSES, and nothing else that could be imported or fetched.

    None of lit_phi2's own: every run adds its callbacks itself, and in a config they could write to any folder.
    jsonargparse keeps what is allowed for the whole process, so it is withdrawn at the end.

    Raises:
        InputError: one of them is not the dotted path of a class.
    """
    defined = [f"{cls.__module__}.{cls.__qualname__}" for cls in ALLOWED_CLASSES]
    packages = [f"lightning.pytorch.{kind}" for kind in ("callbacks", "loggers", "profilers")]
    public = [f"{name}.{path.rpartition('.')[2]}" for path in defined for name in packages if path.startswith(name)]
    allowed = [*defined, *public, *classes]
    try:
        set_parsing_settings(
            import_path_denylist=["*"],
            import_path_allowlist=allowed,
            config_read_mode_fsspec_enabled=False,  # Lightning lets a value be the URL of a config
        )
    except ValueError as error:
        raise InputError(f"--allow_classes {','.join(classes)}: {error}") from error
    try:
        yield
    finally:
        set_parsing_settings(import_path_denylist=["*", *allowed])
