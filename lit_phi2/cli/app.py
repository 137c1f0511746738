"""App: Lightning's CLI with our subcommands, linked keys and early checks.

    arguments (configs first, then flags)
      -> keys of each config checked -> parsed -> checkpoint found, its LoRA settings adopted
      -> LitPhi2, ClaimsDataModule and Trainer built -> Trainer.<subcommand>(model, datamodule, ...)

Data and model meet only here. A value that both need is set once, for the model or for the run, and linked to the other
(`add_arguments_to_parser`), so it is not a key of its own there.
"""

import dataclasses
import inspect
import logging
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lit_phi2.adapters.adapter import check_same_base
from lit_phi2.adapters.checkpoint import read_adapter
from lit_phi2.audit.leakage import LeakageLimits
from lit_phi2.audit.ledger import KEY_FILE
from lit_phi2.audit.provenance import PROVENANCE_FILE
from lit_phi2.cli.arguments import check_question, check_repeated, known_keys, list_keys, with_run_config
from lit_phi2.cli.checks import (
    check_callbacks,
    check_run_name,
    check_run_settings,
    check_strategy,
    check_trainer_settings,
)
from lit_phi2.cli.configs import check_config, config_setting
from lit_phi2.cli.help import LEAKAGE_HELP, requested_help
from lit_phi2.cli.messages import class_error, describe_defaults, name_trainer_key
from lit_phi2.cli.parser import Parser
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.errors import InputError
from lit_phi2.pretrained import resolve_base_model
from lit_phi2.training.fit import TRAINER_DEFAULTS
from lit_phi2.training.module import LitPhi2
from lit_phi2.training.trainer import Trainer
from lit_phi2.utils.console import print_text
from lit_phi2.utils.paths import expand_user, find_checkpoint

log = logging.getLogger(__name__)

TRAINER_KEYS = tuple(inspect.signature(Trainer.__init__).parameters)[1:]
_NOT_SAVED = (
    *("ckpt_path", "output", "instruction", "input", "output_dir", "format", "dtype", "check", "sign", "config"),
    *("record", "replay", "public_key", "what"),
)


class CLI(LightningCLI):
    """Parses arguments, builds model, data and Trainer, and runs the subcommand.

    Args:
        arguments: subcommand, configs, flags, in this order (`configs_first`).
    """

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = with_run_config(arguments)
        super().__init__(
            LitPhi2,
            ClaimsDataModule,
            save_config_callback=None,  # Trainer.fit writes the config into the run's folder
            trainer_class=Trainer,
            trainer_defaults=TRAINER_DEFAULTS,
            parser_class=Parser,
            parser_kwargs={"prog": "lit-phi2"},
            auto_configure_optimizers=False,  # --optimizer would replace the module's optimizer
            load_from_checkpoint_support=False,
        )

    def subcommands(self) -> dict[str, set[str]]:
        """The method of Trainer that is called, and the arguments that the CLI fills in.

        Only one, because the parser of each takes a third of a second to build.
        """
        return {self.arguments[0]: {"model", "datamodule"}}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys outside model, data and trainer."""
        parser.add_argument("--seed_everything", type=int, default=42, help="of record order, new weights and dropout.")
        parser.add_argument(
            "--run_name",
            type=str | None,
            default=None,
            help="name of the run's folder; null: that of the last --config.",
        )
        parser.add_argument(
            "--checkpoint.every_n_steps",
            type=int | None,
            default=None,
            help="most steps from one last.ckpt to the next; optimizer steps. null: no such limit.",
        )
        parser.add_argument(
            "--checkpoint.every_minutes", type=float, default=5.0, help="most minutes from one last.ckpt to the next."
        )
        for limit in dataclasses.fields(LeakageLimits):
            parser.add_argument(
                f"--leakage.{limit.name}", type=float, default=limit.default, help=LEAKAGE_HELP[limit.name]
            )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link the values that both model and data need."""
        parser.link_arguments("model.base", "data.base")
        parser.link_arguments("model.max_new_tokens", "data.max_new_tokens")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("seed_everything", "model.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Print the help if it is asked for; otherwise parse, after checking the keys of each config and flag."""
        subparser = self._subcommand_parsers[self.arguments[0]]
        help_text = requested_help(subparser, self.arguments[0], self.arguments)
        if help_text is not None:
            print_text(help_text)
            raise SystemExit(0)
        configs = [value for name, value in zip(self.arguments, self.arguments[1:], strict=False) if name == "--config"]
        for path in configs:
            check_config(path, known_keys(subparser))
        check_repeated(self.arguments, known_keys(subparser), list_keys(subparser))
        if self.arguments[0] == "predict":
            check_question(self.arguments)
        try:
            self.config = parser.parse_args(self.arguments)
        except InputError as error:
            raise InputError(f"{config_setting(str(error), configs, self.arguments)}{error}") from error
        config = self.config[self.config.subcommand]
        check_run_settings(config)
        self.has_run_name = config.run_name is not None or bool(configs)
        if config.run_name is None:
            config.run_name = Path(configs[-1]).stem if configs else "run"
        if not configs:
            reads_data = not config.get("instruction")
            log.info(describe_defaults(self.config.subcommand, config.model, config.data, reads_data=reads_data))

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning's version would let hyperparameters of the checkpoint replace flags.

        `before_instantiate_classes` reads the checkpoint instead.
        """

    def before_instantiate_classes(self) -> None:
        """Check the settings, and replace the names of checkpoints by paths."""
        config = self.config[self.subcommand]
        check_trainer_settings(config.trainer)
        check_run_name(config.run_name)
        config.trainer.default_root_dir = str(expand_user(config.trainer.default_root_dir, "trainer.default_root_dir"))
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
        if self.subcommand == "verify" and (expand_user(name, "--ckpt_path") / PROVENANCE_FILE).is_file():
            config.ckpt_path = str(expand_user(name, "--ckpt_path"))  # as a whole: an export, or the folder of a run
            return
        if self.subcommand == "report" and expand_user(name, "--ckpt_path").is_dir():
            config.ckpt_path = str(expand_user(name, "--ckpt_path"))  # a run that has no checkpoint yet has a page, too
            return
        root = Path(config.trainer.default_root_dir)
        prefer = "last" if self.subcommand == "fit" else "best"
        checkpoint = find_checkpoint(name, root, config.run_name, prefer=prefer)
        log.info("checkpoint: %s", checkpoint)
        config.ckpt_path = str(checkpoint)
        if self.subcommand in ("validate", "test", "predict", "audit"):
            self._adopt_checkpoint_settings(checkpoint)
        elif self.subcommand == "fit" and checkpoint.is_file():  # before the data is read
            base = resolve_base_model(config.model.base)
            check_same_base(read_adapter(checkpoint), base, source=f"--ckpt_path {checkpoint}")

    def _adopt_checkpoint_settings(self, checkpoint: Path) -> None:
        """Take the LoRA settings from a checkpoint, and log where the config differs; model.base stays."""
        config = self.config[self.subcommand].model
        adapter = read_adapter(checkpoint)
        config.adapter = str(checkpoint)
        settings = {
            "lora_r": adapter.settings.lora_r,
            "lora_alpha": adapter.settings.lora_alpha,
            "target_modules": list(adapter.settings.target_modules),
            "use_rslora": adapter.settings.use_rslora,
        }
        for key, value in settings.items():
            if config[key] != value:
                log.info("model.%s: %s, as in %s; not %s", key, value, checkpoint, config[key])
                config[key] = value

    def instantiate_classes(self) -> None:
        """Build the classes that the trainer section names, data, model and Trainer."""
        try:
            super().instantiate_classes()
        except InputError:
            raise
        except (ValueError, MisconfigurationException) as error:
            if message := class_error(str(error)):
                raise InputError(message) from error
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with the attributes of this run."""
        config = self.config[self.subcommand]
        check_callbacks(self.config_init[self.subcommand].trainer, fit=self.subcommand == "fit")
        try:
            # Other subcommands than fit have no curves.
            trainer = super().instantiate_trainer(**({} if self.subcommand == "fit" else {"logger": False}))
        except InputError:
            raise
        except (TypeError, ValueError, RuntimeError, ImportError, MisconfigurationException) as error:
            raise InputError(name_trainer_key(str(error), TRAINER_KEYS)) from error  # Lightning's own checks
        assert isinstance(trainer, Trainer)
        check_strategy(trainer)
        trainer.run_name = config.run_name
        trainer.run_config = self._run_config()
        trainer.leakage_limits = LeakageLimits(**config.leakage.as_dict())
        trainer.config_run = self._config_run()
        trainer.checkpoint_every_n_steps = config.checkpoint.every_n_steps
        trainer.checkpoint_every_minutes = config.checkpoint.every_minutes
        return trainer

    def _config_run(self) -> Path | None:
        """The folder of the run that the last --config comes from."""
        configs = [value for name, value in zip(self.arguments, self.arguments[1:], strict=False) if name == "--config"]
        folder = Path(configs[-1]).parent if configs else None
        return folder if folder is not None and (folder / KEY_FILE).is_file() else None

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
