"""The command line: python -m lit_phi2 {fit,validate,test,predict,inspect,export} --config configs/tiny.yaml ...

    arguments -> ordered (configs first, then flags) -> keys checked -> Lightning CLI -> early checks -> subcommand

Data and model meet here and nowhere else: what both must know is stated once, for the model or for the run, and linked.
Faults that the user can mend end in a few plain lines and exit code 2 (`LIT_PHI2_TRACEBACK=1` shows where they arose).
"""

import difflib
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import callbacks, loggers, profilers
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lit_phi2.base import find_base
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.errors import InputError, NonFiniteError, Stopped
from lit_phi2.model.lora import read_adapter
from lit_phi2.model.module import LitPhi2
from lit_phi2.runs import find_checkpoint
from lit_phi2.terminal import AFTER_A_FAULT, LOST_PROCESS, printable, set_up_logging
from lit_phi2.trainer import Trainer

log = logging.getLogger(__name__)

TRAINER_DEFAULTS = {
    "default_root_dir": "runs",
    "max_epochs": 3,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": -1,  # all of it: the point of every curve at step 0 is the base
    "use_distributed_sampler": False,  # plan.py deals records to ranks
    "enable_model_summary": False,  # module.py logs what is trained and what is frozen in a line
}


# What a config may name: nothing that would run code it is handed, or send anything. --allow_classes adds to it.
_ALLOWED_CLASSES = (
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
_LOST_PEER = re.compile(r"(?i)gloo|nccl|connection (closed|reset)|broken pipe")
MONITORED = ("val/loss", "val/perplexity", "val/token_accuracy")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code.

    Args:
        arguments: without the program's name; those of the process if None.
    """
    set_up_logging()
    try:
        rest, classes = take_allowed(sys.argv[1:] if arguments is None else arguments)
        allow_classes(classes)
        CLI(order_arguments(rest))
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning turns Ctrl-C into SystemExit(1).
        if not isinstance(stop, KeyboardInterrupt) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        print("\nstopped", file=sys.stderr)
        return 128 + signal.SIGINT
    except (InputError, MisconfigurationException, NonFiniteError, Stopped) as error:
        if os.environ.get("LIT_PHI2_TRACEBACK") == "1":
            raise
        said = "stopped" if isinstance(error, Stopped) else "error"
        if rank_zero_only.rank == 0:  # every rank of several finds the same
            print(printable(f"\n{said}: {error}"), file=sys.stderr)
        return getattr(error, "exit_code", InputError.exit_code)
    except RuntimeError as error:
        if os.environ.get("LIT_PHI2_TRACEBACK") == "1" or not _LOST_PEER.search(str(error)):
            raise
        print(f"\nerror: rank {rank_zero_only.rank}: {LOST_PROCESS}", file=sys.stderr, flush=True)
        os._exit(1)  # what waits for the others at exit would wait in vain
    except OSError as error:  # a full disk, a lost permission, a folder that went away
        if os.environ.get("LIT_PHI2_TRACEBACK") == "1":
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(printable(f"\nerror: {where}{error.strerror or error}. {AFTER_A_FAULT}"), file=sys.stderr)
        return 1
    return 0


def order_arguments(arguments: Sequence[str]) -> list[str]:
    """The subcommand, then configs in their order, then flags: jsonargparse lets the later one win.

    >>> order_arguments(["fit", "--model.lora_r", "8", "--config", "a.yaml", "-c=b.yaml"])
    ['fit', '--config', 'a.yaml', '--config', 'b.yaml', '--model.lora_r', '8']
    """
    configs: list[str] = []
    rest: list[str] = []
    iterator = iter(arguments)
    for argument in iterator:
        name, equals, value = argument.partition("=")
        if name in ("--config", "-c"):
            configs += ["--config", _packaged(value if equals else next(iterator, ""))]
        else:
            rest.append(argument)
    return rest[:1] + configs + rest[1:]


def take_allowed(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments without --allow_classes, and what it names. No config can hold it: it is about what configs may do.

    >>> take_allowed(["fit", "--allow_classes", "a.B,c.D", "--config", "x.yaml"])
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


def allow_classes(classes: Sequence[str]) -> None:
    """Let configs name these classes and a few of Lightning's, and nothing else that could be imported.

    Raises:
        InputError: one of them is no dotted path of a class.
    """
    ours = [f"{found.__module__}.{found.__qualname__}" for found in _ALLOWED_CLASSES]
    short = [f"lightning.pytorch.{kind}" for kind in ("callbacks", "loggers", "profilers")]
    public = [f"{module}.{path.rpartition('.')[2]}" for path in ours for module in short if path.startswith(module)]
    try:
        set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=["lit_phi2", *ours, *public, *classes])
    except ValueError as error:
        raise InputError(f"--allow_classes {','.join(classes)}: {error}") from error


class Parser(LightningArgumentParser):
    """Tells a fault in a few lines instead of a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise InputError(_plain(message, known_keys(self))) from ex


class CLI(LightningCLI):
    """Lightning's CLI with our subcommands, links and early checks.

    Args:
        arguments: ordered.
    """

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments
        super().__init__(
            LitPhi2,
            ClaimsDataModule,
            save_config_callback=None,  # Trainer.fit keeps the config with the run
            trainer_class=Trainer,
            trainer_defaults=TRAINER_DEFAULTS,
            parser_class=Parser,
            parser_kwargs={
                "prog": "lit-phi2",
                "description": f"{__doc__.splitlines()[0]} --allow_classes a.B,c.D lets configs name these too.",
            },
            auto_configure_optimizers=False,  # or --optimizer would override the module's, unasked
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        ours = {"model", "datamodule"}
        return dict.fromkeys(("fit", "validate", "test", "predict", "inspect", "export"), ours)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--seed_everything", type=int, default=42, help="Of data, model and dropout alike.")
        parser.add_argument("--run_name", type=str | None, default=None, help="Names the run's folder.")
        parser.add_argument(
            "--checkpoint.every_n_steps", type=int | None, default=None, help="Optimizer steps between checkpoints."
        )
        parser.add_argument("--checkpoint.every_minutes", type=float, default=5.0, help="Likewise in time.")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.base", "data.base")
        parser.link_arguments("model.max_new_tokens", "data.max_new_tokens")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("seed_everything", "model.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        configs = [value for name, value in zip(self.arguments, self.arguments[1:], strict=False) if name == "--config"]
        subparser = self._subcommand_parsers.get(self.arguments[0] if self.arguments else "")
        if subparser is not None:
            for config in configs:
                check_config(config, known_keys(subparser))
        try:
            self.config = parser.parse_args(self.arguments)
        except InputError as error:
            raise InputError(f"{_file_of(str(error), configs, self.arguments)}{error}") from error
        chosen = self.config[self.config.subcommand]
        if not 0 <= chosen.seed_everything < 2**32:
            raise InputError(f"seed_everything: {chosen.seed_everything} is not between 0 and {2**32 - 1}.")
        for key in ("every_n_steps", "every_minutes"):
            if (value := chosen.checkpoint[key]) is not None and not value > 0:
                raise InputError(f"checkpoint.{key}: {value} is not above 0.")
        self.run_is_named = chosen.run_name is not None or bool(configs)
        if chosen.run_name is None:
            chosen.run_name = Path(configs[-1]).stem if configs else "run"

    def _parse_ckpt_path(self) -> None:
        """Not as Lightning does it: before_instantiate_classes reads the checkpoint, and flags keep their meaning."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        _check_trainer_settings(config.trainer)
        config.trainer.default_root_dir = str(Path(config.trainer.default_root_dir).expanduser())
        if Path(config.run_name).name != config.run_name or config.run_name in ("", ".", ".."):
            raise InputError(f"run_name: {config.run_name!r} is no name for a folder; expected one without '/'.")
        root = Path(config.trainer.default_root_dir)
        name, adapter = config.get("ckpt_path"), config.model.adapter
        if name and adapter:  # a run that started from an adapter, and is now past it
            log.info("model.adapter: %s is not read; --ckpt_path has the weights", adapter)
            config.model.adapter = None
        elif adapter:
            config.model.adapter = str(find_checkpoint(adapter, root, config.run_name, flag="--model.adapter"))
        if not name:
            return
        if name in ("last", "best") and not self.run_is_named:
            raise InputError(f"--ckpt_path {name}: of which run? Give --config or --run_name.")
        prefer = "last" if self.subcommand == "fit" else "best"
        checkpoint = find_checkpoint(name, root, config.run_name, prefer=prefer)
        log.info("checkpoint: %s", checkpoint)
        config.ckpt_path = str(checkpoint)
        if self.subcommand in ("validate", "test", "predict"):
            self._follow(checkpoint)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config[self.subcommand]
        given = self.config_init[self.subcommand].trainer
        for callback in given.callbacks if isinstance(given.callbacks, list) else [given.callbacks]:
            if isinstance(callback, callbacks.Checkpoint):
                raise InputError(
                    f"trainer.callbacks: {type(callback).__name__} has no place here; every run keeps the last and the "
                    "best checkpoint itself (trainer.enable_checkpointing: false keeps none)."
                )
            monitor = getattr(callback, "monitor", None)
            if monitor is not None and monitor not in MONITORED:
                raise InputError(
                    f"trainer.callbacks: {type(callback).__name__} monitors {monitor!r}, which is not measured."
                    f"{_nearest(monitor.replace('_', '/', 1), MONITORED)} There are {', '.join(MONITORED)}."
                )
        ours = given.logger in (None, True)
        # Trainer adds our own logger, checkpoints and progress when it knows the run's folder.
        settings = {"enable_checkpointing": False, "enable_progress_bar": False}
        if ours or self.subcommand != "fit":
            settings["logger"] = False
        try:
            trainer = super().instantiate_trainer(**settings)
        except (TypeError, ValueError, RuntimeError, ImportError) as error:  # Lightning's own checks
            raise InputError(f"trainer: {error}") from error
        assert isinstance(trainer, Trainer)
        _check_strategy(trainer)
        trainer.run_name = config.run_name
        trainer.run_config = self._run_config()
        trainer.checkpoint_every_n_steps = config.checkpoint.every_n_steps
        trainer.checkpoint_every_minutes = config.checkpoint.every_minutes
        trainer.wants_tensorboard = ours
        trainer.wants_checkpoints = given.enable_checkpointing is not False
        trainer.wants_progress = given.enable_progress_bar is not False
        return trainer

    def _follow(self, checkpoint: Path) -> None:
        """Take from a checkpoint the shape of what it holds, and say where the config differs."""
        config = self.config[self.subcommand].model
        adapter = read_adapter(checkpoint)
        config.adapter = str(checkpoint)
        shape = {
            "lora_r": adapter.shape.lora_r,
            "lora_alpha": adapter.shape.lora_alpha,
            "target_modules": list(adapter.shape.target_modules),
        }
        if not self._is_its_base(config.base, adapter.base["base_digest"]):
            shape["base"] = adapter.base["base"]
        for key, value in shape.items():
            if config[key] != value:
                log.info("model.%s: %s, as in %s; not %s", key, value, checkpoint, config[key])
                config[key] = value
        self.config[self.subcommand].data.base = config.base

    def _is_its_base(self, base: str, digest: str) -> bool:
        """Whether the configured base is the one it was trained on, wherever it lies now."""
        if not digest:
            return False
        try:
            return find_base(base).digest == digest
        except InputError:
            return False

    def _run_config(self) -> str:
        """The run as a config from which every subcommand runs: no argument of a single one, and no checkpoint."""
        parser = self._parser(self.subcommand)
        config = self.config[self.subcommand].clone()
        for key in ("ckpt_path", "output", "output_dir", "config"):
            config.pop(key, None)
        dumped: dict[str, Any] = yaml.safe_load(parser.dump(config, skip_unset=False, skip_validation=True))
        for key in ("ckpt_path", "output", "output_dir", "config"):
            dumped.pop(key, None)
        header = "# This run, complete; fit --config with this file trains it again.\n"
        return header + yaml.safe_dump(dumped, sort_keys=False)


def known_keys(parser: Any) -> list[str]:
    """Every key that a config of this parser may have, with dots."""
    return [action.dest for action in parser._actions if action.dest not in ("help", "print_config")]


def check_config(path: str, known: Sequence[str]) -> None:
    """Refuse a config file that cannot be read, or a key that means nothing.

    Raises:
        InputError: names the file, the key and the nearest right one.
    """
    if not Path(path).is_file():
        raise InputError(f"--config {path}: no such file. Packaged: " + ", ".join(f.name for f in _packaged_configs()))
    try:
        content = yaml.safe_load(Path(path).read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no keys; expected sections such as model:, data: and trainer:.")
    for key in _flatten(content):
        if key in _SECTIONS:
            raise InputError(f"{path}: section {key!r} holds no keys; expected some below it, or leave it out.")
        if key not in known and not any(key.startswith(f"{name}.") for name in known if name not in _SECTIONS):
            raise InputError(f"{path}: unknown key {key!r}.{_nearest(key, known)}")


_SECTIONS = ("model", "data", "trainer", "checkpoint")


def _flatten(content: dict[Any, Any], prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name in _SECTIONS:
            yield from _flatten(value, f"{name}.")
        else:
            yield name


def _nearest(key: str, known: Sequence[str]) -> str:
    """A hint: the nearest key, also if only the section is wrong or missing."""
    last = key.rpartition(".")[2]
    matches = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    same_name = [name for name in known if name.rpartition(".")[2] == last]
    if nearest := (same_name or matches):
        return f" Did you mean {nearest[0]!r}?"
    return ""


def _plain(message: str, known: Sequence[str]) -> str:
    """jsonargparse's message without its own vocabulary, and with the nearest key."""
    if match := re.search(r"(?s)(?:Parser key (\S+):)?.*Importing '([\w.]+)' is not allowed", message):
        names = ", ".join(c.__name__ for c in _ALLOWED_CLASSES if not issubclass(c, callbacks.Checkpoint))
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
        return f"{message}.{_nearest(match[1], known)}"
    return message


def _file_of(message: str, configs: Sequence[str], arguments: Sequence[str]) -> str:
    """The config that set the key a message names, to stand before it; nothing where a flag set it."""
    match = re.search(r'key "([\w.]+)"', message)
    if match is None or any(argument.partition("=")[0] == f"--{match[1]}" for argument in arguments):
        return ""
    for config in reversed(configs):
        if match[1] in _flatten(yaml.safe_load(Path(config).read_text("utf-8"))):
            return f"{config}: "
    return ""


def _check_trainer_settings(trainer: Any) -> None:
    """Refuse what would be ignored or would break the promises of the run.

    Raises:
        InputError: names the key and what to use instead.
    """
    if trainer.precision not in (None, 32, "32", "32-true"):
        raise InputError(
            f"trainer.precision: {trainer.precision} has no use here; the compute dtype is model.dtype (auto, bfloat16 "
            "or float32), and LoRA weights are always float32."
        )
    missing = {
        "cuda": not torch.cuda.is_available(),
        "mps": not torch.backends.mps.is_available(),
        "gpu": not (torch.cuda.is_available() or torch.backends.mps.is_available()),
    }
    if missing.get(str(trainer.accelerator).lower()):
        raise InputError(
            f"trainer.accelerator: {trainer.accelerator} was asked for, but torch {torch.__version__} finds none on "
            "this machine. Use auto or cpu, or install a torch that was built for your card."
        )
    if trainer.use_distributed_sampler:
        raise InputError("trainer.use_distributed_sampler: must be false; the plan deals records to processes itself.")
    if trainer.num_sanity_val_steps not in (-1, 0):
        raise InputError(
            "trainer.num_sanity_val_steps: must be -1, so that every curve starts at the base measured on all of "
            "val_files, or 0, to leave that out."
        )
    if trainer.reload_dataloaders_every_n_epochs:
        raise InputError(
            "trainer.reload_dataloaders_every_n_epochs: must be 0; the plan makes every epoch anew itself."
        )
    if trainer.barebones:
        raise InputError("trainer.barebones: must be false; it would drop curves, samples and checkpoints.")


def _check_strategy(trainer: Trainer) -> None:
    """Refuse ways of running over several devices that were made for models of which most is trained.

    Raises:
        InputError: the strategy is neither of one device nor DDP.
    """
    strategy = trainer.strategy
    spawned = getattr(strategy, "_start_method", "popen") != "popen"
    if spawned or not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        raise InputError(
            f"trainer.strategy: {type(strategy).__name__} has no use here: a frozen base of 2.8 B parameters with "
            "2.3 M trained ones fits one card, so every process holds it whole. Use auto or ddp."
        )
    if isinstance(strategy, DDPStrategy):
        # Every rank reads the same base and draws the same adapter; sending it 5.6 GB would change nothing.
        strategy._ddp_kwargs.setdefault("init_sync", False)


def _packaged(path: str) -> str:
    """The path of a config; a name such as configs/tiny.yaml is found in the package where no such file exists."""
    if path and not Path(path).exists():
        for config in _packaged_configs():
            if config.name == Path(path).name and Path(path).parent.name in ("", "configs"):
                return str(config)
    return path


def _packaged_configs() -> list[Path]:
    package = Path(__file__).parent
    folders = (package / "configs", package.parent / "configs")  # installed, and in a clone
    return sorted(next((folder for folder in folders if folder.is_dir()), package).glob("*.yaml"))
