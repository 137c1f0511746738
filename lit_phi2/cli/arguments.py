"""cli/arguments.py."""

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import set_parsing_settings
from lightning.pytorch import callbacks, loggers, profilers

from lit_phi2.errors import InputError


def configs_first(arguments: Sequence[str]) -> list[str]:
    """The subcommand, then configs in their order, then flags: jsonargparse lets the later one win.

    >>> configs_first(["fit", "--model.lora_r", "8", "--config", "a.yaml", "-c=b.yaml"])
    ['fit', '--config', 'a.yaml', '--config', 'b.yaml', '--model.lora_r', '8']
    """
    configs: list[str] = []
    rest: list[str] = []
    iterator = iter(arguments)
    for argument in iterator:
        name, equals, value = argument.partition("=")
        if name in ("--config", "-c"):
            configs += ["--config", resolve_config(value if equals else next(iterator, ""))]
        else:
            rest.append(argument)
    return rest[:1] + configs + rest[1:]


def pop_allow_classes(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments without --allow_classes, and what it names. No config can hold it: it is about what configs may do.

    >>> pop_allow_classes(["fit", "--allow_classes", "a.B,c.D", "--config", "x.yaml"])
    (['fit', '--config', 'x.yaml'], ['a.B', 'c.D'])
    """
    rest: list[str] = []
    classes: list[str] = []
    iterator = iter(arguments)
    for argument in iterator:
        name, equals, value = argument.partition("=")
        if name == "--allow_classes":
            classes += (value if equals else next(iterator, "")).split(",")
        else:
            rest.append(argument)
    return rest, classes


def resolve_config(path: str) -> str:
    """The path of a config; a name such as configs/tiny.yaml is found in the package where no such file exists."""
    if path and not Path(path).exists():
        for config in packaged_configs():
            if config.name == Path(path).name and Path(path).parent.name in ("", "configs"):
                return str(config)
    return path


def packaged_configs() -> list[Path]:
    package = Path(__file__).parent
    folders = (package / "configs", package.parent / "configs")  # installed, and in a clone
    return sorted(next((folder for folder in folders if folder.is_dir()), package).glob("*.yaml"))


# What a config may name: nothing that would run code it is handed, or send anything. --allow_classes adds to it.
ALLOWED_CLASSES = (
    callbacks.DeviceStatsMonitor,
    callbacks.EarlyStopping,
    callbacks.LearningRateMonitor,
    callbacks.ModelCheckpoint,  # only to be refused with its own reason
    callbacks.ModelSummary,
    callbacks.Timer,
    loggers.CSVLogger,
    loggers.TensorBoardLogger,
    profilers.AdvancedProfiler,
    profilers.PyTorchProfiler,
    profilers.SimpleProfiler,
)


def allow_classes(classes: Sequence[str]) -> None:
    """Let configs name these classes and a few of Lightning's, and nothing else that could be imported.

    Raises:
        InputError: one of them is no dotted path of a class.
    """
    ours = [f"{found.__module__}.{found.__qualname__}" for found in ALLOWED_CLASSES]
    shorten = [f"lightning.pytorch.{kind}" for kind in ("callbacks", "loggers", "profilers")]
    public = [f"{module}.{path.rpartition('.')[2]}" for path in ours for module in shorten if path.startswith(module)]
    try:
        set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=["lit_phi2", *ours, *public, *classes])
    except ValueError as error:
        raise InputError(f"--allow_classes {','.join(classes)}: {error}") from error
