"""Base digest: a fingerprint of everything in the folder of a base that decides what the base computes.

    config.json                                                   ->  16 hex digits -+
    tokenizer*.json, special_tokens_map.json, added_tokens.json   ->  16 hex digits -+-> joined by "-"
    the weight files, each as its SHA-256                         ->  16 hex digits -+

Hashing Phi-2 takes seconds, so the SHA-256 of a large file is remembered in the base's folder, if that can be written,
with the size, times and inode of the file: whatever changes the file, or copies it to another place, changes these.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

from lit_phi2.base_config import CONFIG_FILE
from lit_phi2.errors import InputError
from lit_phi2.utils.files import atomic_write

log = logging.getLogger(__name__)

DIGESTS_FILE = ".lit_phi2_digests.json"  # [[name, size, mtime_ns, ctime_ns, inode], SHA-256] of each large file
MIN_REMEMBERED_BYTES = 64 * 2**20  # smaller files are hashed each time
PARTS = ("config", "tokenizer", "weights")  # of a digest, in its order
_TOKENIZER_FILES = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json")
_SETTLED_NS = 2 * 10**9  # a change in the same tick of a file system's clock leaves the times as they are
PROGRESS_SECONDS = 5.0
_BUFFER_BYTES = 4 * 2**20


class FileState(NamedTuple):
    """Values of which at least one changes whenever a file does."""

    name: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


def base_files(folder: Path, weight_files: Iterable[str]) -> tuple[FileState, ...]:
    """The present state of every file that the digest covers."""
    tokenizer_files = {path.name for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)}
    return tuple(_file_state(folder / name) for name in (CONFIG_FILE, *sorted(tokenizer_files), *weight_files))


def base_digest(folder: Path, files: Sequence[FileState]) -> str:
    """The digest of a base.

    Args:
        folder: of the base.
        files: from `base_files`; files that have changed since are an error.

    Raises:
        InputError: a file cannot be read, or changed while it was read.
    """
    known = _read_remembered(folder)
    hashes = {file: known[file] for file in files if file in known and file.size >= MIN_REMEMBERED_BYTES}
    started_ns = time.time_ns()
    new = _hash_files(folder, [file for file in files if file not in hashes])
    check_unchanged(folder, files)
    hashes |= new
    large = {file: value for file, value in hashes.items() if file.size >= MIN_REMEMBERED_BYTES}
    if settled := {file: large[file] for file in new if file in large and _is_settled(file, started_ns)}:
        _remembered_here.update({(folder, file): value for file, value in settled.items()})
        with contextlib.suppress(OSError):  # a folder that cannot be written, or a full disk
            content = [[file, value] for file, value in large.items() if file in settled or file in known]
            atomic_write(folder / DIGESTS_FILE, json.dumps(content, indent=1) + "\n")
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    for file in files:
        parts[_part(file.name)].append(f"{hashes[file]}  {file.name}\n")  # as the program sha256sum prints it
    return "-".join(hashlib.sha256("".join(lines).encode()).hexdigest()[:16] for lines in parts.values())


def check_unchanged(folder: Path, files: Iterable[FileState]) -> None:
    """Refuse a base whose files changed since `base_files` looked at them.

    Raises:
        InputError: names the file.
    """
    for file in files:
        if _file_state(folder / file.name) != file:
            raise InputError(f"model.base: {folder / file.name} changed while it was read. Run the command again.")


def different_parts(digest: str, other: str) -> list[str]:
    """The parts in which two digests differ."""
    pairs = zip(PARTS, digest.split("-"), other.split("-"), strict=False)
    return [part for part, value, expected in pairs if value != expected]


def _part(name: str) -> str:
    if name == CONFIG_FILE:
        return "config"
    return "weights" if name.endswith(".safetensors") else "tokenizer"


def _file_state(path: Path) -> FileState:
    try:
        stat = path.stat()
    except OSError as error:
        raise InputError(f"model.base: {path} cannot be read ({error.strerror}).") from error
    return FileState(path.name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


# SHA-256 of files


def _hash_files(folder: Path, files: Sequence[FileState]) -> dict[FileState, str]:
    """The SHA-256 of each file, several at a time; logs progress if it takes long."""
    if not files:
        return {}
    stop, done, total = Event(), [0], sum(file.size for file in files)

    def add(num_bytes: int) -> None:
        done[0] += num_bytes  # for the progress line alone

    with ThreadPoolExecutor(min(len(files), os.cpu_count() or 1)) as executor:
        try:
            tasks = {file: executor.submit(_sha256, folder / file.name, add, stop) for file in files}
            while wait(tasks.values(), timeout=PROGRESS_SECONDS).not_done:
                log.info("SHA-256 of the base in %s: %.1f of %.1f GB", folder, done[0] / 1e9, total / 1e9)
        finally:
            stop.set()  # after Ctrl-C the threads end at once
        return {file: task.result() for file, task in tasks.items()}


def _sha256(path: Path, add: Callable[[int], None], stop: Event) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_BUFFER_BYTES))
    try:
        with path.open("rb", buffering=0) as file:
            while (num_bytes := file.readinto(buffer)) and not stop.is_set():
                digest.update(buffer[:num_bytes])  # releases the interpreter's lock, as reading does
                add(num_bytes)
    except OSError as error:
        raise InputError(f"model.base: {path} cannot be read ({error.strerror}).") from error
    return digest.hexdigest()


# Remembered hashes

_remembered_here: dict[tuple[Path, FileState], str] = {}  # in this process, for folders that cannot be written


def _is_settled(file: FileState, now_ns: int) -> bool:
    """Whether a later change would be seen in the file's times."""
    return max(file.mtime_ns, file.ctime_ns) < now_ns - _SETTLED_NS


def _read_remembered(folder: Path) -> dict[FileState, str]:
    """The hashes that are remembered for a folder; whatever is damaged or of another form is ignored."""
    known = {file: value for (where, file), value in _remembered_here.items() if where == folder}
    try:
        content = json.loads((folder / DIGESTS_FILE).read_text("utf-8"))
        known |= dict(map(_parse, content))
    except (OSError, ValueError, TypeError, RecursionError):
        pass
    return known


def _parse(entry: Any) -> tuple[FileState, str]:
    (name, *numbers), value = entry
    if not (isinstance(name, str) and all(type(item) is int for item in numbers)):
        raise ValueError("not the state of a file")
    if not re.fullmatch("[0-9a-f]{64}", value):
        raise ValueError("not a SHA-256")
    return FileState(name, *numbers), value
