"""Caches of all runs: how large each is, whether a run can still use it, and their removal.

    runs/cache/1a2b3c4d5e6f7a8b/      ->  CacheInfo(folder, num_bytes, sources, last_used, unused_because=None)
    runs/cache/8b7a6f5e4d3c2b1a/      ->  CacheInfo(..., unused_because="/data/old.jsonl has changed")
    runs/cache/0f1e2d3c4b5a6978.new/  ->  CacheInfo(..., unused_because="the run that wrote it was killed")

No run uses a cache whose files are gone or have changed, or that has another format: every run computes another key.
A cache of unchanged files may be used again, with the base and the settings that it was made with.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_phi2.data.arrow import EXAMPLES_FILE, METADATA_FILE
from lit_phi2.data.cache import CACHE_FORMAT, KEY_FILE, file_state, is_used, lock_file
from lit_phi2.data.prompts import TEMPLATE_VERSION
from lit_phi2.utils.locks import LockedError, file_lock

_FILES = {name + suffix for name in (EXAMPLES_FILE, METADATA_FILE, KEY_FILE) for suffix in ("", ".new", ".lock")}
_UNFINISHED = ".new"


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """A cache on disk.

    Attributes:
        folder: contains it.
        num_bytes: size of its files.
        sources: what it was made from.
        last_used: seconds since 1970.
        unused_because: why no run uses it; None if one may.
    """

    folder: Path
    num_bytes: int
    sources: list[str]
    last_used: float
    unused_because: str | None


def list_caches(cache_dir: Path) -> list[CacheInfo]:
    """The caches in a folder, the last used first; other files and folders in it are ignored."""
    caches = [_read_info(folder) for folder in _cache_folders(cache_dir)]
    return sorted(caches, key=lambda cache: -cache.last_used)


def remove_cache(cache: CacheInfo) -> str | None:
    """Remove a cache that no run uses.

    Returns:
        Why it was not removed; None if it was.
    """
    complete = cache.folder.with_name(cache.folder.name.removesuffix(_UNFINISHED))
    try:
        with file_lock(lock_file(complete), waiting=None):
            if is_used(complete):
                return "a process is reading it"
            if _unused_because(cache.folder) is None:
                return "it is used now"
            doomed = complete.with_name(complete.name + _UNFINISHED)  # a kill leaves no folder that looks complete
            if doomed != cache.folder:
                shutil.rmtree(doomed, ignore_errors=True)
                cache.folder.rename(doomed)
            shutil.rmtree(doomed)
    except LockedError:
        return "a process is writing or opening it"
    except OSError as error:
        return str(error.strerror or error)
    return None


def _cache_folders(cache_dir: Path) -> Iterator[Path]:
    """Folders with the name of a cache and no file that is not of a cache."""
    for folder in cache_dir.iterdir() if cache_dir.is_dir() else ():
        if re.fullmatch(rf"[0-9a-f]{{16}}({re.escape(_UNFINISHED)})?", folder.name) and folder.is_dir():
            with suppress(OSError):  # another process may remove it
                if not folder.is_symlink() and {path.name for path in folder.iterdir()} <= _FILES:
                    yield folder


def _read_info(folder: Path) -> CacheInfo:
    sources = _read_json(folder / KEY_FILE).get("sources") or _read_json(folder / METADATA_FILE).get("sources") or []
    num_bytes = sum(file.stat().st_size for file in folder.iterdir())
    unused_because = None if _is_being_written(folder) else _unused_because(folder)
    return CacheInfo(folder, num_bytes, sources, folder.stat().st_mtime, unused_because)


def _is_being_written(folder: Path) -> bool:
    if not folder.name.endswith(_UNFINISHED):
        return False
    try:
        with file_lock(lock_file(folder.with_name(folder.name.removesuffix(_UNFINISHED))), waiting=None):
            return False
    except LockedError:
        return True
    except OSError:  # a read-only folder
        return False


def _unused_because(folder: Path) -> str | None:
    if folder.name.endswith(_UNFINISHED):
        return "the run that wrote it was killed"
    key = _read_json(folder / KEY_FILE)
    if key.get("format") != CACHE_FORMAT or key.get("template") != TEMPLATE_VERSION:
        return "another version of lit_phi2 wrote it"
    for state in key.get("states", []):
        if isinstance(state, list) and (now := file_state(Path(state[0]))) != state:
            return f"{state[0]} {'no longer exists' if now is None else 'has changed'}"
    return None


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a file; empty if there is none."""
    try:
        value = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
