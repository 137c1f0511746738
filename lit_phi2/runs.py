"""Runs: where a run lives on disk, and which checkpoint a name means.

    runs/tiny/version_0/      config.yaml  events.out.tfevents*  samples.jsonl  predictions.jsonl
        checkpoints/          last.ckpt  best.ckpt
        adapter/              PEFT form

A checkpoint is named by a .ckpt, a folder with an exported adapter, a run's folder, or `last` or `best` of the newest
run.
"""

import re
from pathlib import Path

from lit_phi2.errors import InputError
from lit_phi2.model.lora import CONFIG_FILE


def open_run(root: Path, run_name: str) -> Path:
    """A new folder version_<n>; two runs that start at once get two."""
    parent = root / run_name
    parent.mkdir(parents=True, exist_ok=True)
    number = max((_version(folder) for folder in parent.glob("version_*")), default=-1) + 1
    while True:
        try:
            (parent / f"version_{number}").mkdir()
        except FileExistsError:
            number += 1
        else:
            return parent / f"version_{number}"


def find_checkpoint(name: str, root: Path, run_name: str) -> Path:
    """The .ckpt file or the folder with an adapter that a name means.

    Args:
        name: as given to --ckpt_path.
        root: trainer.default_root_dir.
        run_name: whose newest run `last` and `best` look into.

    Raises:
        InputError: there is none.
    """
    if name in ("last", "best"):
        runs = sorted((root / run_name).glob("version_*"), key=_version, reverse=True)
        found = next((path for run in runs if (path := run / "checkpoints" / f"{name}.ckpt").is_file()), None)
        if found is None:
            raise InputError(
                f"--ckpt_path {name}: no run of {run_name!r} under {root.resolve()} has a {name}.ckpt. Train one with "
                "fit, or give --run_name, --trainer.default_root_dir or the path of a checkpoint."
            )
        return found
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if (path / CONFIG_FILE).is_file():
        return path
    for candidate in (path / "checkpoints" / "best.ckpt", path / "checkpoints" / "last.ckpt"):
        if candidate.is_file():
            return candidate
    expected = "expected a .ckpt, a folder with an adapter, the folder of a run, or 'last' or 'best'"
    found_there = "holds none" if path.is_dir() else "does not exist"
    raise InputError(f"--ckpt_path {name}: {found_there}; {expected}.")


def run_folder(checkpoint: Path) -> Path:
    """The folder of the run that a checkpoint belongs to; for one that lies alone, the folder it lies in."""
    if checkpoint.is_dir():  # an adapter
        return checkpoint.parent if (checkpoint.parent / "config.yaml").is_file() else checkpoint
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent


def _version(folder: Path) -> int:
    match = re.fullmatch(r"version_(\d+)", folder.name)
    return int(match[1]) if match else -1
