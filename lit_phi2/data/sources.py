"""Sources: a path, folder, glob, claims:SPLIT or hub:owner/name[:split] -> rows, each with its line.

    .jsonl .ndjson    one object per line                     1, 2, 3        line
    .json             an array of objects, or one per line    2, 3, "3:42"   line; line:column from a line's second on
    .csv .tsv         a header, then one row per record       2, 3, 6        line on which the row begins
    .parquet          one row per record                      1, 2, 3        row
    claims:train      packaged .jsonl; claims:train[:1700] is its first 1,700 records
    hub:owner/name    rows that `datasets` streams            1, 2, 3        row
    -                 standard input: one object per line     1, 2, 3        line of <stdin>

    reports/          its files of records, sorted by name; not those in its folders
    reports/*.csv     the files that match, sorted; reports/**/*.csv also in folders at any depth

Endings are the same in upper case, and .gz or .zst may follow one. A row that cannot be parsed is an UnparsableRow and
costs one record. A source that cannot be read at all is an InputError.

Files are parsed here (`readers/`) because the readers of `datasets` give no line, fail as a whole on one invalid row,
and leave copies of private records in a cache in the home folder.
"""

import glob
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from lit_phi2.data.readers.delimited import read_delimited
from lit_phi2.data.readers.files import ENDINGS, FORMATS, STDIN, split_ending
from lit_phi2.data.readers.json_array import read_json
from lit_phi2.data.readers.json_lines import read_json_lines
from lit_phi2.data.readers.parquet import read_parquet
from lit_phi2.data.readers.rows import Rows, without_nan
from lit_phi2.errors import InputError

log = logging.getLogger(__name__)

CLAIMS_DIR = Path(__file__).parent.parent / "assets" / "claims"
PROGRESS_SECONDS = 5.0  # between two lines about a source that is still being read

_MAX_NAMES = 5  # files that a message names

_HUB_TIMEOUT = 10.0  # seconds

_revisions: dict[str, str | None] = {}  # of the hub datasets that hub_revision was asked for

_READERS: dict[str, Callable[[Path, str | None], Rows]] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": read_delimited,
    ".tsv": lambda path, encoding: read_delimited(path, encoding, delimiter="\t"),
    ".parquet": lambda path, encoding: read_parquet(path),
}


def expand_sources(sources: Sequence[str]) -> list[str]:
    """The sources with each folder and each glob replaced by its files of records, sorted.

    A path that exists is that path, also if it contains the characters of a glob. Hidden files and files with other
    endings are left out of a folder and of what a glob matches.

    Args:
        sources: paths, folders, globs, claims:SPLIT, hub:owner/name[:split], or - for standard input.

    Raises:
        InputError: a folder or a glob has no file of records.
    """
    return [file for source in sources for file in _expand(source)]


def read_rows(source: str, *, encoding: str | None = None) -> Rows:
    """All rows of a source with their lines, counted from 1; no line occurs twice. Logs progress after five seconds.

    Args:
        source: a path, claims:SPLIT or hub:owner/name[:split].
        encoding: of files of text without a byte order mark; None is UTF-8. See `readers/encodings.py`.

    Raises:
        InputError: the source does not exist, cannot be read, or has an unknown format.
    """
    if source.startswith("hub:"):
        rows: Rows = enumerate(_read_hub(source), start=1)
    elif source.startswith("claims:"):
        rows = _read_packaged(source)
    elif source == STDIN:
        return read_json_lines(Path(STDIN), encoding)
    else:
        rows = _read_file(source, encoding)
    return _log_progress(source, rows)


# Folders and globs


def _expand(source: str) -> list[str]:
    path = os.path.expanduser(source)
    if source == "-":
        return [STDIN]
    if source.startswith(("claims:", "hub:")) or os.path.isfile(path):
        return [source]
    if os.path.isdir(path):
        try:
            names = sorted(entry.name for entry in os.scandir(path) if entry.is_file() and entry.name[0] != ".")
        except OSError as error:
            raise InputError(f"{source}: the folder cannot be read ({error.strerror}).") from error
        hint = f"Files in its folders are read with {os.path.join(source, '**', '*.jsonl')}"
        return _files_of_records(source, [os.path.join(source, name) for name in names], f"the folder holds. {hint}")
    if glob.has_magic(source) and "\0" not in source and not os.path.exists(path):
        files = sorted(match for match in glob.glob(path, recursive=True) if os.path.isfile(match))
        return _files_of_records(source, files, f"the pattern matches from the folder you are in, {Path.cwd()}")
    return [source]


def _files_of_records(source: str, files: list[str], what: str) -> list[str]:
    found = [file for file in files if split_ending(file)[0] in FORMATS]
    if found:
        return found
    names = ", ".join(os.path.basename(file) for file in files[:_MAX_NAMES]) or "nothing"
    more = f" and {len(files) - _MAX_NAMES} more" if len(files) > _MAX_NAMES else ""
    raise InputError(f"{source}: no file of records; expected {ENDINGS}. There is {names}{more} that {what}.")


# Files


def _read_file(source: str, encoding: str | None) -> Rows:
    path = Path(os.path.expanduser(source))
    if not os.path.exists(path):
        raise InputError(f"{source}: no such file. Paths are taken from the folder you are in, {Path.cwd()}.")
    if not os.path.isfile(path):
        raise InputError(f"{source}: is not a file; expected one ending in {ENDINGS}.")
    ending = split_ending(path.name)[0]
    if ending not in _READERS:
        raise InputError(f"{source}: unknown format {ending!r}; expected a file ending in {ENDINGS}.")
    return _READERS[ending](path, encoding)


def _read_packaged(source: str) -> Rows:
    match = re.fullmatch(r"claims:(\w+)(?:\[:([1-9]\d*)\])?", source)
    path = CLAIMS_DIR / f"{match[1] if match else ''}.jsonl"
    if match is None or not path.is_file():
        names = ", ".join(f"claims:{packaged.stem}" for packaged in sorted(CLAIMS_DIR.glob("*.jsonl")))
        raise InputError(
            f"{source}: is not packaged; expected one of {names}. "
            "claims:train[:1700] is the first 1,700 records of claims:train."
        )
    return islice(read_json_lines(path), int(match[2]) if match[2] else None)


# The hub


def _read_hub(source: str) -> Iterator[Any]:
    from datasets import load_dataset

    name, _, split = source.removeprefix("hub:").partition(":")
    revision = _revisions.get(name)
    try:
        yield from map(without_nan, load_dataset(name, split=split or "train", revision=revision, streaming=True))
    except Exception as error:  # network, name, split or format: the hub client raises many types
        raise InputError(
            f"{source}: the dataset could not be read ({type(error).__name__}). Expected hub:owner/name[:split] and a "
            "network, or a file on this machine."
        ) from error


def hub_revision(source: str) -> str | None:
    """The commit of a hub dataset, whose rows are read from now on; None without a network."""
    from huggingface_hub import HfApi

    name = source.removeprefix("hub:").partition(":")[0]
    try:
        _revisions[name] = HfApi().dataset_info(name, timeout=_HUB_TIMEOUT).sha
    except Exception as error:  # network, name or permission; reading the rows then says what is wrong
        log.info("%s: the revision is not known without a network (%s)", source, type(error).__name__)
        _revisions.pop(name, None)
    return _revisions.get(name)


def _log_progress(source: str, rows: Rows) -> Rows:
    """The rows; logs their number about every five seconds, and at the end if that was ever necessary."""
    started = last = time.monotonic()
    count = 0
    for row in rows:
        yield row
        count += 1
        if (now := time.monotonic()) - last >= PROGRESS_SECONDS:
            log.info("%s: %s records read", source, f"{count:,}")
            last = now
    if last != started:
        log.info("%s: %s records read, all", source, f"{count:,}")
