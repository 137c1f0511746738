"""App: Lightning's CLI with our subcommands, linked keys and early checks.

    arguments (configs first, then flags)
      -> keys of each config checked -> parsed -> checkpoint found, its LoRA settings adopted
      -> LitPhi2, ClaimsDataModule and Trainer built -> Trainer.<subcommand>(model, datamodule, ...)

Data and model meet only here. A value that both need is set once, for the model or for the run, and linked to the other
(`add_arguments_to_parser`), so it is not a key of its own there.
"""

import logging
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lit_phi2.adapters.checkpoint import read_adapter
from lit_phi2.cli.arguments import ALLOWED_CLASS_NAMES, check_config, config_setting, known_keys
from lit_phi2.cli.checks import (
    check_callbacks,
    check_run_name,
    check_run_settings,
    check_strategy,
    check_trainer_settings,
)
from lit_phi2.cli.messages import humanize_parser_error
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.errors import InputError
from lit_phi2.pretrained import resolve_base_model
from lit_phi2.training.module import LitPhi2
from lit_phi2.training.trainer import Trainer
from lit_phi2.utils.paths import find_checkpoint

log = logging.getLogger(__name__)

SUBCOMMANDS = ("fit", "validate", "test", "predict", "inspect", "export")
DESCRIPTION = (
    "Fine-tune Phi-2 with LoRA on instruction/response records. "
    "--allow_classes a.B,c.D lets configs name these classes, too."
)
TRAINER_DEFAULTS = {
    "default_root_dir": "runs",
    "max_epochs": 3,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": -1,  # all of val_files: every curve starts with the base at step 0
    "use_distributed_sampler": False,  # data/schedule.py distributes records to ranks
    "enable_model_summary": False,  # training/module.py logs the number of trained and frozen weights
}
_NOT_SAVED = ("ckpt_path", "output", "output_dir", "config")


class Parser(LightningArgumentParser):
    """Raises an InputError with a short message, where jsonargparse prints its usage and exits."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise InputError(humanize_parser_error(message, known_keys(self), ALLOWED_CLASS_NAMES)) from ex


class CLI(LightningCLI):
    """Parses arguments, builds model, data and Trainer, and runs the subcommand.

    Args:
        arguments: subcommand, configs, flags, in this order (`configs_first`).
    """

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments
        super().__init__(
            LitPhi2,
            ClaimsDataModule,
            save_config_callback=None,  # Trainer.fit writes the config into the run's folder
            trainer_class=Trainer,
            trainer_defaults=TRAINER_DEFAULTS,
            parser_class=Parser,
            parser_kwargs={"prog": "lit-phi2", "description": DESCRIPTION},
            auto_configure_optimizers=False,  # --optimizer would replace the module's optimizer
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Methods of Trainer, and the arguments that the CLI fills in."""
        return {name: {"model", "datamodule"} for name in SUBCOMMANDS}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys outside model, data and trainer."""
        parser.add_argument(
            "--seed_everything", type=int, default=42, help="Seed of record order, new adapter weights and dropout."
        )
        parser.add_argument(
            "--run_name", type=str | None, default=None, help="The run's folder; null: the stem of the last --config."
        )
        parser.add_argument(
            "--checkpoint.every_n_steps",
            type=int | None,
            default=None,
            help="Write last.ckpt at least every N optimizer steps; null: no such limit.",
        )
        parser.add_argument(
            "--checkpoint.every_minutes", type=float, default=5.0, help="Write last.ckpt at least every M minutes."
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link the values that both model and data need."""
        parser.link_arguments("model.base", "data.base")
        parser.link_arguments("model.max_new_tokens", "data.max_new_tokens")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("seed_everything", "model.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments, after checking the keys of each config."""
        configs = [value for name, value in zip(self.arguments, self.arguments[1:], strict=False) if name == "--config"]
        subparser = self._subcommand_parsers.get(self.arguments[0] if self.arguments else "")
        if subparser is not None:
            for path in configs:
                check_config(path, known_keys(subparser))
        try:
            self.config = parser.parse_args(self.arguments)
        except InputError as error:
            raise InputError(f"{config_setting(str(error), configs, self.arguments)}{error}") from error
        config = self.config[self.config.subcommand]
        check_run_settings(config)
        self.has_run_name = config.run_name is not None or bool(configs)
        if config.run_name is None:
            config.run_name = Path(configs[-1]).stem if configs else "run"

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning's version would let hyperparameters of the checkpoint replace flags.

        `before_instantiate_classes` reads the checkpoint instead.
        """

    def before_instantiate_classes(self) -> None:
        """Check the settings, and replace the names of checkpoints by paths."""
        config = self.config[self.subcommand]
        check_trainer_settings(config.trainer)
        check_run_name(config.run_name)
        config.trainer.default_root_dir = str(Path(config.trainer.default_root_dir).expanduser())
        self._resolve_adapter()
        if config.get("ckpt_path"):
            self._resolve_ckpt_path()

    def _resolve_adapter(self) -> None:
        config = self.config[self.subcommand]
        adapter = config.model.adapter
        if not adapter:
            return
        if config.get("ckpt_path"):  # the run started from this adapter; its checkpoint has the weights by now
            log.info("model.adapter: %s is not read; --ckpt_path has the weights", adapter)
            config.model.adapter = None
            return
        root = Path(config.trainer.default_root_dir)
        config.model.adapter = str(find_checkpoint(adapter, root, config.run_name, flag="--model.adapter"))

    def _resolve_ckpt_path(self) -> None:
        config = self.config[self.subcommand]
        name = config.ckpt_path
        if name in ("last", "best") and not self.has_run_name:
            raise InputError(f"--ckpt_path {name}: which run? Give --config or --run_name.")
        root = Path(config.trainer.default_root_dir)
        prefer = "last" if self.subcommand == "fit" else "best"
        checkpoint = find_checkpoint(name, root, config.run_name, prefer=prefer)
        log.info("checkpoint: %s", checkpoint)
        config.ckpt_path = str(checkpoint)
        if self.subcommand in ("validate", "test", "predict"):
            self._adopt_checkpoint_settings(checkpoint)

    def _adopt_checkpoint_settings(self, checkpoint: Path) -> None:
        """Take LoRA settings and base from a checkpoint, and log where the config differs."""
        config = self.config[self.subcommand].model
        adapter = read_adapter(checkpoint)
        config.adapter = str(checkpoint)
        settings = {
            "lora_r": adapter.settings.lora_r,
            "lora_alpha": adapter.settings.lora_alpha,
            "target_modules": list(adapter.settings.target_modules),
        }
        if not self._same_base(config.base, adapter.base["base_digest"]):
            settings["base"] = adapter.base["base"]
        for key, value in settings.items():
            if config[key] != value:
                log.info("model.%s: %s, as in %s; not %s", key, value, checkpoint, config[key])
                config[key] = value
        self.config[self.subcommand].data.base = config.base

    def _same_base(self, base: str, digest: str) -> bool:
        """Whether the configured base is the one with this digest, in whatever folder it is now."""
        if not digest:
            return False
        try:
            return resolve_base_model(base).digest == digest
        except InputError:
            return False

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with the attributes of this run.

        Lightning's logger, checkpoints and progress bar are off: Trainer adds ours when the run has a folder.
        """
        config = self.config[self.subcommand]
        requested = self.config_init[self.subcommand].trainer
        check_callbacks(requested.callbacks)
        default_logger = requested.logger in (None, True)
        settings: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False}
        if default_logger or self.subcommand != "fit":
            settings["logger"] = False
        try:
            trainer = super().instantiate_trainer(**settings)
        except (TypeError, ValueError, RuntimeError, ImportError) as error:  # Lightning's own checks
            raise InputError(f"trainer: {error}") from error
        assert isinstance(trainer, Trainer)
        check_strategy(trainer)
        trainer.run_name = config.run_name
        trainer.run_config = self._run_config()
        trainer.checkpoint_every_n_steps = config.checkpoint.every_n_steps
        trainer.checkpoint_every_minutes = config.checkpoint.every_minutes
        trainer.enable_tensorboard = default_logger
        trainer.enable_checkpoints = requested.enable_checkpointing is not False
        trainer.enable_progress = requested.enable_progress_bar is not False
        return trainer

    def _run_config(self) -> str:
        """The run as YAML for every subcommand: without checkpoint and arguments of a single subcommand."""
        parser = self._parser(self.subcommand)
        config = self.config[self.subcommand].clone()
        for key in _NOT_SAVED:
            config.pop(key, None)
        dumped: dict[str, Any] = yaml.safe_load(parser.dump(config, skip_unset=False, skip_validation=True))
        for key in _NOT_SAVED:
            dumped.pop(key, None)
        header = "# All settings of this run; fit --config with this file trains it again.\n"
        return header + yaml.safe_dump(dumped, sort_keys=False)
