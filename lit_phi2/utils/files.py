"""Files: replace a file so that a kill never leaves half of it, and detect damage by a digest.

atomic_write    content -> <name>.new, flushed -> renamed to <name>
tree_digest     nested plain values and tensors -> SHA-256
"""

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def atomic_write(path: Path, content: str | bytes | Iterable[str]) -> None:
    """Write beside `path`, then rename: a reader finds the old file or the new one, complete, whenever it looks.

    Raises:
        OSError: the disk is full or cannot be written; names `path`, which is unchanged.
    """
    tmp_path = path.with_name(path.name + ".new")
    parts: Iterable[str | bytes] = [content] if isinstance(content, str | bytes) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tmp_path.open("wb") as file:
            for part in parts:
                file.write(part.encode() if isinstance(part, str) else part)
            file.flush()
            os.fsync(file.fileno())
        tmp_path.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            tmp_path.unlink()  # it may be what filled the disk
        raise OSError(error.errno, error.strerror, str(path)) from error


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
