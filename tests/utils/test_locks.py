"""One process at a time holds a lock, on every system, and a killed one holds none."""

import errno
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers import ROOT
from lit_phi2.errors import InputError
from lit_phi2.utils import locks
from lit_phi2.utils.locks import LockedError, file_lock

HOLD = """
import sys, time
from pathlib import Path
from lit_phi2.utils.locks import file_lock
with file_lock(Path(sys.argv[1]), waiting=None):
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock until it reads a line."""
    command = [sys.executable, "-c", HOLD, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_lock_that_another_process_holds_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.lock"
    with holder(path) as process:
        with (
            pytest.raises(LockedError, match=r"x\.lock: is locked by another process") as error,
            file_lock(path, waiting=None),
        ):
            pass
        assert isinstance(error.value, InputError)
        process.communicate("\n")
    assert not path.exists(), "the holder removes it"
    with file_lock(path, waiting=None):
        assert path.exists()


def test_a_lock_is_free_when_its_holder_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with holder(path) as process:
        process.kill()
        process.wait()
        assert path.exists()
        with file_lock(path, waiting=None):
            pass
    assert not path.exists()


def test_one_that_waits_says_so_once_and_gets_the_lock(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder is killed in the third pause."""
    path = tmp_path / "x.lock"
    pauses: list[float] = []
    with holder(path) as process, caplog.at_level("INFO", "lit_phi2"):

        def pause(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 3:
                process.kill()
                process.wait()

        monkeypatch.setattr(locks.time, "sleep", pause)
        with file_lock(path, waiting="waiting for the other"):
            assert len(pauses) == 3
        monkeypatch.undo()
    assert [record.getMessage() for record in caplog.records] == ["waiting for the other"]


def test_every_process_that_waits_holds_it_alone(tmp_path: Path) -> None:
    """Four processes add one to a number in a file, 25 times each: no increment is lost."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    program = (
        "import sys; from pathlib import Path; from lit_phi2.utils.locks import file_lock\n"
        "file = Path(sys.argv[1])\n"
        "for _ in range(25):\n"
        "    with file_lock(file.with_name('counter.lock'), waiting='waiting'):\n"
        "        file.write_text(str(int(file.read_text()) + 1))\n"
    )
    program = program.replace("for _", "from lit_phi2.utils import locks; locks.POLL_SECONDS = 0.001\nfor _")
    processes = [subprocess.Popen([sys.executable, "-c", program, str(counter)], cwd=ROOT) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert counter.read_text() == "100"
    assert [path.name for path in tmp_path.iterdir()] == ["counter"]


def test_windows_locks_the_first_byte_with_msvcrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """msvcrt.locking raises OSError where the byte is locked, and closing the file unlocks it."""
    locked: set[int] = set()
    modes: list[tuple[int, int]] = []

    def locking(descriptor: int, mode: int, num_bytes: int) -> None:
        modes.append((mode, num_bytes))
        if locked:
            raise OSError(errno.EACCES, "Permission denied")
        locked.add(descriptor)

    monkeypatch.setattr(locks, "fcntl", None)
    monkeypatch.setattr(locks, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    path = tmp_path / "x.lock"
    with file_lock(path, waiting=None), pytest.raises(LockedError), file_lock(path, waiting=None):
        pass
    locked.clear()
    with file_lock(path, waiting=None):
        pass
    assert modes == [(2, 1)] * 3


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_does_not_stop_a_run(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, operation: int) -> Any:
        raise OSError(code, "not supported")

    monkeypatch.setattr(locks, "fcntl", SimpleNamespace(flock=flock, LOCK_EX=2, LOCK_NB=4))
    with file_lock(tmp_path / "x.lock", waiting=None):
        pass


def test_without_fcntl_and_msvcrt_nothing_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "fcntl", None)
    monkeypatch.setattr(locks, "msvcrt", None)
    path = tmp_path / "x.lock"
    with file_lock(path, waiting=None), file_lock(path, waiting=None):
        pass
    assert not path.exists()
