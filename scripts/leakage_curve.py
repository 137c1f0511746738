"""Leakage curve: exposure and extraction of canaries by how often they are planted, for adapters of several ranks.

    fit --data.canaries N --model.lora_r R, for each R  ->  audit --what leakage  ->  scripts/measurements/leakage.json

python scripts/leakage_curve.py && python scripts/plots.py
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from measurement import ROOT, write_measurement

BEYOND_LIMITS = 3  # exit code of an audit whose verdict is negative


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--canaries", type=int, default=8)
    parser.add_argument("--records", type=int, default=40, help="packaged claims beside the canaries")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=5e-3)
    parser.add_argument("--root", default="runs", help="folder of the runs")
    parser.add_argument("--output", type=Path, default=ROOT / "scripts" / "measurements" / "leakage.json")
    args = parser.parse_args()
    audits = {str(rank): measure(args, rank) for rank in args.ranks}
    settings = {name: getattr(args, name) for name in ("canaries", "records", "epochs", "learning_rate")}
    write_measurement(args.output, "leakage", {"settings": settings, "ranks": audits})
    print(args.output)


def measure(args: argparse.Namespace, rank: int) -> dict[str, Any]:
    """What the audit of an adapter of this rank writes."""
    settings = {
        "config": "tiny.yaml",
        "run_name": f"leakage-{rank}",
        "trainer.default_root_dir": args.root,
        "trainer.max_epochs": args.epochs,
        "model.lora_r": rank,
        "model.lora_alpha": 2 * rank,
        "model.learning_rate": args.learning_rate,
        "data.canaries": args.canaries,
        "data.train_files": f"claims:train[:{args.records}]",
        "data.val_files": "claims:validation[:40]",
    }
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    run("fit", [*flags, "--trainer.limit_val_batches", "0"], allowed=(0,))
    run("audit", [*flags, "--ckpt_path", "last", "--what", "leakage"], allowed=(0, BEYOND_LIMITS))
    files = (Path(args.root) / f"leakage-{rank}").glob("version_*/audit_leakage.json")
    file = max(files, key=lambda path: path.stat().st_mtime)
    audit: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return {"membership": audit["membership"], "canaries": audit["canaries"]}


def run(subcommand: str, flags: list[str], *, allowed: tuple[int, ...]) -> None:
    code = subprocess.run([sys.executable, "-m", "lit_phi2", subcommand, *flags], check=False).returncode
    if code not in allowed:
        raise SystemExit(f"{subcommand} ended with exit code {code}")


if __name__ == "__main__":
    main()
