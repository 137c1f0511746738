"""Folder: a folder that appears complete, or not at all.

    .DIR.export  written, flushed to disk  ->  renamed to DIR

A kill or a full disk leaves DIR as it was. What a killed export leaves of .DIR.export, the next export to DIR removes.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lit_phi2.errors import InputError
from lit_phi2.utils.locks import file_lock

REPORT_FILE = "export.json"
_EARLIER_EXPORTS = (REPORT_FILE, "adapter_config.json")  # one of them is in every folder that an export wrote


def check_output_dir(folder: Path) -> None:
    """Refuse a folder with files that no export wrote, since an export replaces the whole folder.

    Raises:
        InputError: it is a file, or holds other files.
    """
    if folder.is_file():
        raise InputError(f"--output_dir {folder}: is a file; expected a folder, which may be new.")
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / name).is_file() for name in _EARLIER_EXPORTS):
        raise InputError(
            f"--output_dir {folder}: holds files that no export wrote, and an export replaces the whole folder. Give a "
            "new folder."
        )


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
            _flush(folder.parent)
        finally:
            for leftover in (new, old):
                shutil.rmtree(leftover, ignore_errors=True)


def flush_tree(folder: Path) -> None:
    """Write every file of a folder, and the folder itself, to disk."""
    for path, _, files in os.walk(folder):
        for name in files:
            _flush(Path(path, name))
        _flush(Path(path))


def _flush(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:  # Windows opens no folder, and some file systems flush none
        if error.errno not in (errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
