"""The command line: python -m lit_phi2 {fit,validate,test,predict,inspect,export} --config configs/tiny.yaml ...

    arguments -> ordered (configs first, then flags) -> keys checked -> Lightning CLI -> early checks -> subcommand

Data and model meet here and nowhere else: what both must know is stated once, for the model or for the run, and linked.
Faults that the user can mend end in a few plain lines and exit code 2 (`LIT_PHI2_TRACEBACK=1` shows where they arose).
"""

import logging
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import callbacks
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lit_phi2.adapters.checkpoint import read_adapter
from lit_phi2.cli.checks import MONITORED, check_strategy, check_trainer_settings
from lit_phi2.cli.messages import check_config, config_setting, did_you_mean, humanize_parser_error, known_keys
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.errors import InputError
from lit_phi2.pretrained import resolve_base_model
from lit_phi2.training.module import LitPhi2
from lit_phi2.training.trainer import Trainer
from lit_phi2.utils.paths import find_checkpoint

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


class Parser(LightningArgumentParser):
    """Tells a fault in a few lines instead of a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise InputError(humanize_parser_error(message, known_keys(self))) from ex


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
            raise InputError(f"{config_setting(str(error), configs, self.arguments)}{error}") from error
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
        check_trainer_settings(config.trainer)
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
            self._adopt_checkpoint_settings(checkpoint)

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
                    f"{did_you_mean(monitor.replace('_', '/', 1), MONITORED)} There are {', '.join(MONITORED)}."
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
        check_strategy(trainer)
        trainer.run_name = config.run_name
        trainer.run_config = self._run_config()
        trainer.checkpoint_every_n_steps = config.checkpoint.every_n_steps
        trainer.checkpoint_every_minutes = config.checkpoint.every_minutes
        trainer.enable_tensorboard = ours
        trainer.enable_checkpoints = given.enable_checkpointing is not False
        trainer.enable_progress = given.enable_progress_bar is not False
        return trainer

    def _adopt_checkpoint_settings(self, checkpoint: Path) -> None:
        """Take from a checkpoint the shape of what it holds, and say where the config differs."""
        config = self.config[self.subcommand].model
        adapter = read_adapter(checkpoint)
        config.adapter = str(checkpoint)
        shape = {
            "lora_r": adapter.settings.lora_r,
            "lora_alpha": adapter.settings.lora_alpha,
            "target_modules": list(adapter.settings.target_modules),
        }
        if not self._same_base(config.base, adapter.base["base_digest"]):
            shape["base"] = adapter.base["base"]
        for key, value in shape.items():
            if config[key] != value:
                log.info("model.%s: %s, as in %s; not %s", key, value, checkpoint, config[key])
                config[key] = value
        self.config[self.subcommand].data.base = config.base

    def _same_base(self, base: str, digest: str) -> bool:
        """Whether the configured base is the one it was trained on, wherever it lies now."""
        if not digest:
            return False
        try:
            return resolve_base_model(base).digest == digest
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
