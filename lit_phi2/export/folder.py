"""Folder: a folder that appears complete, or not at all.

    .DIR.export  written, flushed to disk  ->  renamed to DIR

A kill or a full disk leaves DIR as it was. What a killed export leaves of .DIR.export, the next export to DIR removes.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lit_phi2.base_digest import DIGESTS_FILE
from lit_phi2.errors import InputError
from lit_phi2.utils.files import flush
from lit_phi2.utils.json_objects import read_json_object
from lit_phi2.utils.locks import file_lock

REPORT_FILE = "export.json"
# Of `fit`, which writes no report.
_PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json", "lit_phi2.json", "provenance.json")


def check_output_dir(folder: Path) -> None:
    """Refuse a folder with files that no export wrote, since an export replaces the whole folder.

    export.json lists what an export wrote: a base.gguf of 5 GB that somebody put beside the adapter is not among it.

    Raises:
        InputError: it is a file, or holds other files.
    """
    if folder.is_file():
        raise InputError(f"--output_dir {folder}: is a file; expected a folder, which may be new.")
    if not folder.is_dir():
        return
    written = _written_files(folder)
    foreign = [name for name in sorted(path.name for path in folder.iterdir()) if not _is_ours(name, written)]
    if foreign:
        raise InputError(
            f"--output_dir {folder}: holds files that no export wrote, such as {foreign[0]}, and an export replaces "
            "the whole folder. Give a new folder, or move them."
        )


def _written_files(folder: Path) -> set[str]:
    """What an export wrote into a folder, as it says itself."""
    if not (folder / REPORT_FILE).is_file():
        return set(_PEFT_FILES) if (folder / _PEFT_FILES[1]).is_file() else set()
    files = read_json_object(folder / REPORT_FILE).get("files")
    return {REPORT_FILE, *(name for name in files if isinstance(name, str))} if isinstance(files, list) else set()


def _is_ours(name: str, written: set[str]) -> bool:
    """Whether a file was written by an export, or is a lock or the digests that lit_phi2 keeps beside weights."""
    return name in written or name == DIGESTS_FILE or name.endswith(".lock")


@contextlib.contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write to, which becomes `folder` at the end of the block, unless the block raises.

    Raises:
        InputError: see check_output_dir; or another process exports to the same folder.
        OSError: the disk is full or cannot be written.
    """
    folder = folder.absolute()
    check_output_dir(folder)
    new, old = folder.with_name(f".{folder.name}.export"), folder.with_name(f".{folder.name}.replaced")
    with file_lock(folder.with_name(f".{folder.name}.export.lock"), waiting=None):
        if old.is_dir() and not folder.is_dir():
            old.rename(folder)  # an export was killed between its two renames
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        new.mkdir(parents=True)
        try:
            yield new
            flush_tree(new)
            if folder.is_dir():
                folder.rename(old)
            new.rename(folder)
            flush(folder.parent)
        finally:
            for leftover in (new, old):
                shutil.rmtree(leftover, ignore_errors=True)


def flush_tree(folder: Path) -> None:
    """Write every file of a folder, and the folder itself, to disk."""
    for path, _, files in os.walk(folder):
        for name in files:
            flush(Path(path, name))
        flush(Path(path))
