"""Locks: one process at a time works on a file or folder.

    free                                ->  held until the block ends, or the process does, however it ends
    held, with a `waiting` message      ->  log it, wait
    held, without                       ->  LockedError

The lock is an empty file beside what it protects. The system locks it (flock, or msvcrt on Windows), so one that a
killed process leaves behind is free. Where neither exists, or the file system has no locks, nothing is locked.
"""

import contextlib
import errno
import importlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_phi2.errors import InputError

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1


class LockedError(InputError):
    """Another process holds the lock."""


def _import_or_none(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


fcntl = _import_or_none("fcntl")  # POSIX
msvcrt = _import_or_none("msvcrt")  # Windows


@contextlib.contextmanager
def file_lock(path: Path, *, waiting: str | None) -> Iterator[None]:
    """Hold an exclusive lock between processes; a second lock in the same process counts as another process.

    Args:
        path: of the lock file; it and its folder are created, and the file is removed at the end.
        waiting: logged once if the lock is held by another process, before waiting for it. None: do not wait.

    Raises:
        LockedError: `waiting` is None and the lock is held.
        OSError: the lock file cannot be created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _try_acquire(path)
    if descriptor is None:
        if waiting is None:
            raise LockedError(f"{path}: is locked by another process. Wait until it ends.")
        log.info(waiting)
        while (descriptor := _try_acquire(path)) is None:
            time.sleep(POLL_SECONDS)
    try:
        yield
    finally:
        _release(path, descriptor)


def _try_acquire(path: Path) -> int | None:
    """The descriptor of the locked file; None if another process holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _lock(descriptor):
                os.close(descriptor)
                return None
            if _is_file_at(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_file_at(path: Path, descriptor: int) -> bool:
    """Whether an open file is still the one at its path: a holder removes the file, then releases the lock."""
    try:
        return os.name == "nt" or os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _lock(descriptor: int) -> bool:
    """Lock without waiting; False if another process holds it, True also where there are no locks."""
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:  # some network file systems have no locks
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
    elif msvcrt is not None:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # the first byte, also of an empty file
        except OSError:
            return False
    return True


def _release(path: Path, descriptor: int) -> None:
    if os.name == "nt":  # an open file cannot be removed, neither ours nor that of a process about to lock it
        os.close(descriptor)
    with contextlib.suppress(OSError):
        path.unlink()
    if os.name != "nt":
        os.close(descriptor)
