"""Program config: the config.yaml of a run whose model, data and Trainer a program or a notebook built.

    LitPhi2(lora_r=4)  ClaimsDataModule(packing=False)  Trainer(max_steps=9)
      ->  model: {lora_r: 4, ...}   data: {packing: false, ...}   trainer: {max_steps: 9, ...}

With it, every subcommand of the command line works on the run too.
"""

from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import yaml

_PLAIN = (str, int, float, bool, type(None))


def program_config(trainer: pl.Trainer, model: Any, datamodule: Any) -> str:
    """YAML with the arguments of the three constructors.

    Args:
        trainer: with `settings`, `run_name`, the checkpoint intervals and the limits of the leakage audit.
        model: with `arguments`.
        datamodule: with `arguments`.
    """
    settings = {name: str(value) if name == "default_root_dir" else value for name, value in trainer.settings.items()}
    objects = sorted(name for name, value in settings.items() if not isinstance(value, _PLAIN))
    config = {
        "run_name": trainer.run_name,
        "seed_everything": model.seed,
        "checkpoint": {
            "every_n_steps": trainer.checkpoint_every_n_steps,
            "every_minutes": trainer.checkpoint_every_minutes,
        },
        "leakage": asdict(trainer.leakage_limits),
        "model": {name: value for name, value in model.arguments.items() if name != "seed"},
        "data": {
            name: value
            for name, value in datamodule.arguments.items()
            if name not in ("base", "max_new_tokens", "seed")  # as those of the model
        },
        "trainer": {name: value for name, value in settings.items() if name not in objects},
    }
    header = "# The settings of a run that a program started.\n"
    if objects:
        header += f"# Not in here, because they are objects of that program: trainer.{', trainer.'.join(objects)}\n"
    return header + yaml.safe_dump(config, sort_keys=False)
