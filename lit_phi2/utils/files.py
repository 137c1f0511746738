"""Files: replace a file so that a kill never leaves half of it, read one that grows, and detect damage by a digest.

atomic_write       content -> <name>.new, flushed -> renamed to <name>
read_json_lines    {"step": 0, ...}\\n{"step": 1, ...}\\n{"st   ->  the first two objects
tree_digest        nested plain values and tensors -> SHA-256
"""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_phi2.errors import InputError
from lit_phi2.utils.locks import file_lock

if TYPE_CHECKING:
    from torch import Tensor


def atomic_write(path: Path, content: str | bytes | Iterable[str | bytes]) -> None:
    """Write beside `path`, then rename: a reader finds the old file or the new one, complete, whenever it looks.

    Of two processes that write the same file at once, one waits: `<name>.new` has a fixed name, so that the next write
    replaces what a killed process leaves of it.

    Raises:
        OSError: the disk is full or cannot be written; names `path`, which is unchanged.
    """
    tmp_path = path.with_name(path.name + ".new")
    waiting = f"{path}: waiting for another process that is writing it"
    try:
        with file_lock(tmp_path.with_name(tmp_path.name + ".lock"), waiting=waiting):
            try:
                _write(tmp_path, content)
                tmp_path.replace(path)
            except BaseException:
                with contextlib.suppress(OSError):
                    tmp_path.unlink()  # it may be what filled the disk
                raise
            flush(path.parent)  # the rename itself
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write(path: Path, content: str | bytes | Iterable[str | bytes]) -> None:
    parts: Iterable[str | bytes] = [content] if isinstance(content, str | bytes) else content
    with path.open("wb") as file:
        for part in parts:
            file.write(part.encode() if isinstance(part, str) else part)
        file.flush()
        os.fsync(file.fileno())


def flush(path: Path) -> None:
    """Write what the system holds of a file or a folder to disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:  # Windows opens no folder, and some file systems flush none
        if error.errno not in (errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file that has one on each line, in order.

    Only a line feed ends a line: str.splitlines would also cut the texts of records, at U+2028, U+0085 and others. A
    last line without one was cut short by a kill, and is left out.

    Raises:
        InputError: a line is no JSON object; names it.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            if not isinstance(value, dict):
                raise InputError(f"{path}:{number}: is damaged; expected a JSON object. Delete the line or the file.")
            yield value


def tree_digest(value: Any) -> str:
    """SHA-256 of nested plain values and tensors: the same after saving and loading, another after one flipped bit.

    >>> import torch
    >>> tree_digest({"a": [1, torch.zeros(2)]}) == tree_digest({"a": [1, torch.zeros(2)]})
    True
    >>> tree_digest({"a": [1, torch.zeros(2)]}) == tree_digest({"a": [1, torch.tensor([0.0, -0.0])]})
    False
    """
    sha256 = hashlib.sha256()
    for part in _parts(value):
        sha256.update(len(part).to_bytes(8, "little") + part)
    return sha256.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, dict):
        yield f"{len(value)} keys".encode()
        for key, item in value.items():
            yield repr(key).encode()
            yield from _parts(item)
    elif isinstance(value, list | tuple):
        yield f"{len(value)} items".encode()
        for item in value:
            yield from _parts(item)
    elif isinstance(value, str | bytes | int | float | None):
        yield repr(value).encode()
    else:
        yield from _tensor_parts(value)


def _tensor_parts(value: "Tensor | object") -> Iterator[bytes]:
    import torch  # here, so that what only writes files does not load it

    if isinstance(value, torch.Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    else:
        yield repr(value).encode()
