"""Paths: the folder of a run, and the checkpoint that a name refers to.

    runs/tiny/version_0/      config.yaml  events.out.tfevents*  samples.jsonl  predictions.jsonl  drafts.npz
        checkpoints/          last.ckpt  best.ckpt
        adapter/              PEFT form
        ledger.parquet, ledger_key.json, provenance.json, report.html

    last, best                -> that checkpoint of the newest run of this run_name
    a .ckpt or .gguf file     -> itself
    a folder with an adapter  -> itself
    the folder of a run       -> its last.ckpt for fit, its best.ckpt otherwise

`last` and `best` never fall back to an older run: its weights would be used without notice.
"""

import re
from pathlib import Path

from lit_phi2.errors import InputError

ADAPTER_CONFIG_FILE = "adapter_config.json"  # PEFT's name, and mlx-lm's
GGUF_SUFFIX, GGUF_ADAPTER_FILE = ".gguf", "adapter.gguf"


def expand_user(name: str, setting: str) -> Path:
    """The path, with a leading ~ or ~user replaced by that user's home folder.

    Args:
        name: as a flag or a config gives it; a shell leaves the ~ of --output=~/a.jsonl.
        setting: the flag or key, for messages.

    Raises:
        InputError: this machine has no such user.
    """
    path = Path(name)
    if not name.startswith("~"):
        # A Path drops the ./ of ./~name, so only an absolute one is not expanded later.
        return path.absolute() if str(path).startswith("~") else path
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise InputError(
            f"{setting}: {name!r} begins with the home folder of a user that this machine does not have. For a name "
            f"that begins with ~ itself, give ./{name}"
        ) from error


def create_run_dir(root: Path, run_name: str) -> Path:
    """Create the next folder version_<n>; two runs that start at the same time get two folders.

    Raises:
        InputError: root is a file, or lies below one.
    """
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
    """The .ckpt or .gguf file, or the folder with an adapter, that a name refers to.

    Args:
        name: value of --ckpt_path.
        root: trainer.default_root_dir.
        run_name: `last` and `best` refer to its newest run.
        prefer: `last` or `best`; the checkpoint that the folder of a run refers to.
        flag: the flag or key that holds the name, for messages.

    Raises:
        InputError: there is no such checkpoint.
    """
    if name in ("last", "best"):
        return _newest_checkpoint(name, root, run_name, flag)
    path = expand_user(name, flag)
    if path.is_file() or (path / ADAPTER_CONFIG_FILE).is_file():
        return path
    if (path / GGUF_ADAPTER_FILE).is_file():
        return path / GGUF_ADAPTER_FILE
    for kind in (prefer, "best", "last"):
        if (path / "checkpoints" / f"{kind}.ckpt").is_file():
            return path / "checkpoints" / f"{kind}.ckpt"
    problem = "contains no checkpoint" if path.is_dir() else "does not exist"
    raise InputError(
        f"{flag} {name}: {problem}; expected a .ckpt, a .gguf, a folder with an adapter, the folder of a run, or "
        "'last' or 'best'."
    )


def _newest_checkpoint(name: str, root: Path, run_name: str, flag: str) -> Path:
    newest = max((root / run_name).glob("version_*"), key=_version, default=None)
    if newest is None:
        raise InputError(
            f"{flag} {name}: no run of {run_name!r} under {root.absolute()}. Train one with fit, or give "
            "--run_name, --trainer.default_root_dir or the path of a checkpoint."
        )
    checkpoint = newest / "checkpoints" / f"{name}.ckpt"
    if not checkpoint.is_file():
        raise InputError(
            f"{flag} {name}: the newest run, {newest}, has no {name}.ckpt. Give the path of another checkpoint."
        )
    return checkpoint


def run_dir_of(checkpoint: Path) -> Path:
    """The folder of the run that a checkpoint belongs to; if it belongs to none, the folder that contains it."""
    checkpoint = checkpoint.absolute() if checkpoint.parent == Path() else checkpoint  # given as last.ckpt or .
    if checkpoint.is_dir():  # an adapter
        return checkpoint.parent if (checkpoint.parent / "config.yaml").is_file() else checkpoint
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent


def _version(folder: Path) -> int:
    match = re.fullmatch(r"version_(\d+)", folder.name)
    return int(match[1]) if match else -1
