"""Files: a name -> format and compression; a path -> its bytes, decompressed.

claims.jsonl          .jsonl
Claims.CSV.GZ         .csv        gzip
claims.parquet.zst    .parquet    zstd, with pyarrow
<stdin>               standard input, which can be read once
"""

import gzip
import io
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from lit_phi2.errors import InputError

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
ENDINGS = ".jsonl, .ndjson, .json, .csv, .tsv or .parquet, or in one of these and .gz or .zst"

STDIN = "<stdin>"  # as messages name it; a file of this name has no ending, and so is none of records

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}

# The first bytes of files that are often named as if they were text.
_SIGNATURES = {
    b"\x1f\x8b": "is compressed with gzip; its name must end in .gz.",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; its name must end in .zst.",
    b"PK\x03\x04": "is a zip archive or an Excel workbook. Unpack it, or save it as CSV UTF-8.",
    b"PAR1": "is a Parquet file; its name must end in .parquet.",
}


def split_ending(name: str) -> tuple[str, str | None]:
    """The ending that names the format, in lower case, and the compression; the format may be an unknown one.

    >>> split_ending("Claims.CSV.GZ")
    ('.csv', 'gzip')
    """
    path = Path(name.lower())
    compression = _COMPRESSIONS.get(path.suffix)
    return (path.with_suffix("") if compression else path).suffix, compression


@contextmanager
def open_bytes(path: Path) -> Iterator[io.BufferedReader]:
    """The decompressed bytes of a file.

    Raises:
        InputError: while the file is opened or read: it cannot be read, or is not compressed as its name says.
    """
    compression = split_ending(path.name)[1]
    try:
        with _open(path, compression) as file:
            yield file
    except (EOFError, zlib.error) as error:
        raise InputError(_not_compressed(path, compression)) from error
    except OSError as error:
        if error.errno is None:  # of gzip or pyarrow, and not of the system
            raise InputError(_not_compressed(path, compression)) from error
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error


def check_signature(path: Path, file: io.BufferedReader) -> None:
    """Check that a file of text does not begin as an archive or a Parquet file does.

    Raises:
        InputError: it does.
    """
    head = file.peek(4)[:4]
    for signature, message in _SIGNATURES.items():
        if head.startswith(signature):
            raise InputError(f"{path}: {message}")


def _open(path: Path, compression: str | None) -> io.BufferedReader:
    if str(path) == STDIN:
        if sys.stdin is None:
            raise InputError(f"{STDIN}: this process has no standard input.")
        # Not sys.stdin itself: a thread that waits for it would block the end of the process.
        return os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    if compression == "gzip":
        return io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(path)))
    if compression == "zstd":
        import pyarrow  # type: ignore[import-untyped]  # slow to import, rarely needed

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _not_compressed(path: Path, compression: str | None) -> str:
    return f"{path}: is not a complete {compression} file: it is cut off, damaged or not compressed. Copy it again."
