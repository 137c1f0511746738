"""Files that survive a kill, and that tell when they were damaged: written aside, flushed, renamed; with a digest."""

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch


def atomic_write(path: Path, content: str | bytes | Iterable[str]) -> None:
    """Write beside `path`, then put it in place: a reader finds the old file or the new, whole, whatever happens.

    Raises:
        OSError: the disk is full, or may not be written; names `path`, which is as it was.
    """
    aside = path.with_name(path.name + ".new")
    parts: Iterable[str | bytes] = [content] if isinstance(content, str | bytes) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            for part in parts:
                file.write(part.encode() if isinstance(part, str) else part)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()  # it may be what filled the disk
        raise OSError(error.errno, error.strerror, str(path)) from error


def tree_digest(value: Any) -> str:
    """Of plain values and tensors, however nested: equal after saving and loading, and no more after a bit flipped.

    >>> tree_digest({"a": [1, torch.zeros(2)]}) == tree_digest({"a": [1, torch.zeros(2)]})
    True
    >>> tree_digest({"a": [1, torch.zeros(2)]}) == tree_digest({"a": [1, torch.tensor([0.0, -0.0])]})
    False
    """
    found = hashlib.sha256()
    for part in _parts(value):
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, torch.Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, dict):
        yield f"{len(value)} keys".encode()
        for key, held in value.items():
            yield repr(key).encode()
            yield from _parts(held)
    elif isinstance(value, list | tuple):
        yield f"{len(value)} items".encode()
        for held in value:
            yield from _parts(held)
    else:
        yield repr(value).encode()
