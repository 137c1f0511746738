"""Cache: the examples of large files, written once and then read from disk.

    files of up to 64 MiB    ->  lists in memory, nothing on disk    splits.py
    larger files             ->  <cache_dir>/<hash of the key>/      examples.arrow, metadata.json (arrow.py), key.json

The key contains everything that decides the examples: the state of the files, the revision of hub datasets, template,
tokenizer, reading options and limits. A cache is written under a lock into a folder `<hash>.new` and then renamed, so
that two runs that start together write it once, and a kill leaves no folder that looks complete. Each process that
reads it holds a lock on a file of its own, `<hash>.<random>.use`, so that a used cache is not removed
(`cache_list.py`).
"""

import hashlib
import json
import logging
import os
import shutil
import uuid
import weakref
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lit_phi2.data.arrow import open_split, write_split
from lit_phi2.data.prompts import TEMPLATE_VERSION
from lit_phi2.data.sources import CLAIMS_DIR, hub_revision
from lit_phi2.data.splits import ExampleSource, Split, SplitBuilder
from lit_phi2.utils.files import atomic_write, tree_digest
from lit_phi2.utils.locks import LockedError, file_lock

log = logging.getLogger(__name__)

MAX_IN_MEMORY_BYTES = 64 * 2**20  # size of the files; their examples take up to ten times as much memory
CACHE_FORMAT = 4  # of the files in a cache, and of the records that are read from a source; part of the key
KEY_FILE = "key.json"

_COMPRESSED = (".gz", ".zst")
_COMPRESSION_RATIO = 5  # of text; compressed records take as much memory as others


def is_large(sources: Sequence[str]) -> bool:
    """Whether the files together exceed MAX_IN_MEMORY_BYTES; packaged and hub sources do not count."""
    files = [Path(source).expanduser() for source in sources]
    return sum(_text_bytes(file) for file in files if file.is_file()) > MAX_IN_MEMORY_BYTES


def cache_key(sources: Sequence[str], tokenizer: PreTrainedTokenizerBase, **options: Any) -> dict[str, Any]:
    """Everything that decides the examples.

    Args:
        sources: files, claims: and hub:, after folders and globs are expanded.
        tokenizer: of the base.
        options: of reading, limits and hold-out, as values that JSON can hold.
    """
    return {
        "format": CACHE_FORMAT,
        "sources": list(sources),
        "states": [_source_state(source) for source in sources],
        "template": TEMPLATE_VERSION,
        "tokenizer": tree_digest([tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id]),
        **options,
    }


def load_or_build_cache(
    sources: list[str], source: ExampleSource, *, skip: bool, cache_dir: Path, key: dict[str, Any]
) -> Split:
    """The split from the cache; the first run writes it.

    Args:
        sources: the files that `source` reads.
        source: reads and encodes the records.
        skip: whether overlong records are skipped; otherwise they are invalid.
        cache_dir: contains the caches.
        key: from `cache_key`.

    Raises:
        InputError: the cache is damaged.
        OSError: the disk is full or not writable.
    """
    names = ", ".join(sources)
    key = _with_known_revisions(key, cache_dir)
    folder = cache_dir / _digest(key)
    with ExitStack() as lock:
        try:
            waiting = f"{names}: waiting for another process that works on the same cache, {folder}"
            lock.enter_context(file_lock(lock_file(folder), waiting=waiting))
        except OSError:
            if not folder.is_dir():
                raise  # otherwise the folder is read-only, and nothing can remove the cache
        if not folder.is_dir():
            log.info("%s: large, so tokenized once, into %s", names, folder)
            _build(folder, SplitBuilder(source, skip=skip), sources, key)
        split = open_split(folder)
        _hold(folder, split)
    size = sum(file.stat().st_size for file in folder.iterdir())
    log.info("%s: reading tokens from %s, %.1f GB", names, folder, size / 1e9)
    return split


def lock_file(folder: Path) -> Path:
    """What a process locks while it writes, opens or removes a cache."""
    return folder.with_name(f"{folder.name}.lock")


def is_used(folder: Path) -> bool:
    """Whether a process reads the cache; the files that killed processes left are removed."""
    used = False
    for file in folder.parent.glob(f"{folder.name}.*.use"):
        try:
            with file_lock(file, waiting=None):  # free: its process has ended; the file is removed
                pass
        except LockedError:
            used = True
    return used


def file_state(file: Path) -> list[Any] | None:
    """Values that change whenever the file changes; None if there is no such file."""
    if not file.is_file():
        return None
    stat = file.stat()
    return [str(file.absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _text_bytes(file: Path) -> int:
    """The size of a file; about that of its text if it is compressed."""
    ratio = _COMPRESSION_RATIO if file.suffix.lower() in _COMPRESSED else 1
    return file.stat().st_size * ratio


def _source_state(source: str) -> list[Any] | str | None:
    """The state of a file, the revision of a hub dataset."""
    if source.startswith("hub:"):
        return hub_revision(source)
    if source.startswith("claims:"):
        return file_state(CLAIMS_DIR / f"{source.removeprefix('claims:').partition('[')[0]}.jsonl")
    return file_state(Path(source).expanduser())


def _with_known_revisions(key: dict[str, Any], cache_dir: Path) -> dict[str, Any]:
    """The key; where a hub revision is unknown, that of the cache last used that is equal in everything else."""
    sources, states = key.get("sources", []), key.get("states", [])
    unknown = [
        index
        for index, (source, state) in enumerate(zip(sources, states, strict=True))
        if source.startswith("hub:") and state is None
    ]
    candidates = sorted(cache_dir.glob(f"*/{KEY_FILE}"), key=_last_used, reverse=True) if unknown else []
    for file in candidates:
        with suppress(OSError, ValueError, KeyError, TypeError, IndexError):  # not a cache of this format
            other = json.loads(file.read_text("utf-8"))
            completed = [other["states"][index] if index in unknown else state for index, state in enumerate(states)]
            if other == json.loads(json.dumps({**key, "states": completed})):
                log.info("%s: reading the revision that was cached", ", ".join(sources[index] for index in unknown))
                return {**key, "states": completed}
    return key


def _last_used(file: Path) -> float:
    return file.parent.stat().st_mtime


def _digest(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _build(folder: Path, builder: SplitBuilder, sources: list[str], key: dict[str, Any]) -> None:
    tmp_folder = folder.with_name(folder.name + ".new")
    shutil.rmtree(tmp_folder, ignore_errors=True)  # left by a run that was killed
    tmp_folder.mkdir()
    try:
        write_split(tmp_folder, builder, sources)
        atomic_write(tmp_folder / KEY_FILE, json.dumps(key) + "\n")
        tmp_folder.replace(folder)
    except BaseException:
        shutil.rmtree(tmp_folder, ignore_errors=True)
        raise


def _hold(folder: Path, split: Split) -> None:
    """Mark the cache as used for as long as the split exists, and now as the time of its last use."""
    use = ExitStack()
    with suppress(OSError):  # a read-only folder
        use.enter_context(file_lock(folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.use"), waiting=None))
        os.utime(folder)
    weakref.finalize(split.examples, use.close)
