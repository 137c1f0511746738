"""Sweep: fit with every combination of settings, and print a Markdown table of the results.

    python scripts/sweep.py --config configs/tiny.yaml --set model.lora_r=1,2,8,16 --set model.learning_rate=2e-3,5e-3
    python scripts/sweep.py --set model.lora_r+model.lora_alpha=1+2,8+16          keys that change together

Each run is a process, one at a time, so that times compare. A finished run is not repeated: its row is in
OUTPUT_DIR/sweep.jsonl. Arguments after -- are passed to every fit.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_phi2.utils.files import read_json_lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/tiny.yaml")
    parser.add_argument("--set", action="append", required=True, metavar="KEY=VALUE,VALUE", help="may be repeated")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/sweep"))
    parser.add_argument("extra", nargs="*", help="arguments of every fit, after --")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    keys, choices = zip(
        *((key, values.split(",")) for key, values in (setting.split("=") for setting in args.set)), strict=True
    )
    print("| " + " | ".join([*keys, "steps", "seconds", "val/loss", "val/token_accuracy"]) + " |")
    print("|" + "---|" * (len(keys) + 4))
    for values in itertools.product(*choices):
        row = run(args, dict(zip(keys, values, strict=True)))
        cells = [f"{row['steps']:.0f}", f"{row['seconds']:.0f}", f"{row['loss']:.4f}", f"{row['accuracy']:.4f}"]
        print("| " + " | ".join([*values, *cells]) + " |")
        sys.stdout.flush()


def run(args: argparse.Namespace, settings: dict[str, str]) -> dict[str, float]:
    """The row of one fit, from the file if it was run before."""
    pairs = [
        (key, value)
        for joined, values in settings.items()
        for key, value in zip(joined.split("+"), values.split("+"), strict=True)
    ]
    flags = [part for key, value in pairs for part in (f"--{key}", value)] + args.extra
    file = args.output_dir / "sweep.jsonl"
    name = " ".join([args.config, *flags])
    if file.is_file():
        for row in read_json_lines(file):
            if row["name"] == name:
                return row
    root = args.output_dir / "fits"
    command = [sys.executable, "-m", "lit_phi2", "fit", "--config", args.config, *flags]
    command += ["--trainer.default_root_dir", str(root), "--run_name", "sweep"]
    start = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.monotonic() - start
    folder = max((root / "sweep").glob("version_*"), key=lambda path: int(path.name.removeprefix("version_")))
    events = EventAccumulator(str(folder)).Reload()
    loss, accuracy = (events.Scalars(f"val/{metric}")[-1].value for metric in ("loss", "token_accuracy"))
    row = {"name": name, "steps": events.Scalars("train/loss")[-1].step, "seconds": seconds}
    row |= {"loss": loss, "accuracy": accuracy}
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")
    return row


if __name__ == "__main__":
    main()
