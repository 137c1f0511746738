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

ADAPTER_CONFIG_FILE = "adapter_config.json"  # PEFT's name


def create_run_dir(root: Path, run_name: str) -> Path:
    """A new folder version_<n>; two runs that start at once get two."""
    parent = root / run_name
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(
            f"trainer.default_root_dir: {root} is a file, or lies below one; expected a folder."
        ) from error
    number = max((_version(folder) for folder in parent.glob("version_*")), default=-1) + 1
    while True:
        try:
            (parent / f"version_{number}").mkdir()
        except FileExistsError:
            number += 1
        else:
            return parent / f"version_{number}"


def find_checkpoint(name: str, root: Path, run_name: str, *, prefer: str = "best", flag: str = "--ckpt_path") -> Path:
    """The .ckpt file or the folder with an adapter that a name means.

    Args:
        name: as given to --ckpt_path.
        root: trainer.default_root_dir.
        run_name: whose newest run `last` and `best` look into.
        prefer: which of the two a run's folder means.
        flag: what the name was given to, for messages.

    Raises:
        InputError: there is none.
    """
    if name in ("last", "best"):
        newest = max((root / run_name).glob("version_*"), key=_version, default=None)
        if newest is None:
            raise InputError(
                f"{flag} {name}: no run of {run_name!r} under {root.absolute()}. Train one with fit, or give "
                "--run_name, --trainer.default_root_dir or the path of a checkpoint."
            )
        found = newest / "checkpoints" / f"{name}.ckpt"
        if not found.is_file():
            raise InputError(f"{flag} {name}: the newest run, {newest}, has no {name}.ckpt. Give the path of another.")
        return found
    path = Path(name).expanduser()
    if path.is_file() or (path / ADAPTER_CONFIG_FILE).is_file():
        return path
    for kind in (prefer, "best", "last"):
        if (path / "checkpoints" / f"{kind}.ckpt").is_file():
            return path / "checkpoints" / f"{kind}.ckpt"
    expected = "expected a .ckpt, a folder with an adapter, the folder of a run, or 'last' or 'best'"
    found_there = "holds none" if path.is_dir() else "does not exist"
    raise InputError(f"{flag} {name}: {found_there}; {expected}.")


def run_dir_of(checkpoint: Path) -> Path:
    """The folder of the run that a checkpoint belongs to; for one that lies alone, the folder it lies in."""
    checkpoint = checkpoint.absolute() if checkpoint.parent == Path() else checkpoint  # given as last.ckpt or .
    if checkpoint.is_dir():  # an adapter
        return checkpoint.parent if (checkpoint.parent / "config.yaml").is_file() else checkpoint
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent


def _version(folder: Path) -> int:
    match = re.fullmatch(r"version_(\d+)", folder.name)
    return int(match[1]) if match else -1
