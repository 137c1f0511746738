"""Startup: seconds of --help beside an import of Lightning's CLI, and from the start to the first optimizer step."""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

COMMANDS = {
    "import lightning.pytorch.cli": ["-c", "import lightning.pytorch.cli"],
    "--help": ["-m", "lit_phi2", "--help"],
    "fit --help": ["-m", "lit_phi2", "fit", "--help"],
}


def startup(args: argparse.Namespace) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(args.rounds):
        for name, command in COMMANDS.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - began)
    import_seconds = seconds["import lightning.pytorch.cli"]
    for name, values in seconds.items():
        ratio = median(a / b for a, b in zip(values, import_seconds, strict=True))
        print(f"{name}: {median(values):.1f} s, {ratio:.2f} times the import", flush=True)
    print(f"first step {first_step_seconds():.1f} s after the start")


def first_step_seconds() -> float:
    """From the start of `fit` to its first optimizer step, the validation and samples of step 0 included."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tempfile.TemporaryDirectory() as folder:
        began = time.time()
        fit = [sys.executable, "-m", "lit_phi2", "fit", "--config", "configs/tiny.yaml", "--trainer.max_steps", "1"]
        fit += ["--trainer.log_every_n_steps", "1", "--trainer.default_root_dir", folder]
        subprocess.run(fit, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        events = EventAccumulator(str(next(Path(folder).glob("*/version_0")))).Reload()
        first_step: float = events.Scalars("train/loss")[0].wall_time
        return first_step - began
