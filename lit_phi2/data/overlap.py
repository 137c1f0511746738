"""Overlap: what two splits share, and files that a split names twice; counts and names of files, no text of a record.

    train   a.jsonl     prompts a b c d        val   link to a.jsonl, v.jsonl     prompts c e
      ->  "data.val_files shares with data.train_files: 1 of its 2 files (link), 1 of its 2 prompts. ..."

Equal prompts make a metric measure what was trained on, so they are counted for every pair of splits that is set up.
Hashes of 8 bytes are compared (`splits.py`), a sorted array of one split with chunks of the other: ten million records
take a few seconds, and 100 MB that are then free again.
"""

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from lit_phi2.data.records import Record
from lit_phi2.data.splits import Split, prompt_hash

_COMPARED = ("train", "val", "test")  # in predict nothing is measured
_CHUNK = 2**20  # hashes compared at once
_MAX_NAMES = 3  # files that a warning names


def drop_repeated(sources: Sequence[str], setting: str) -> tuple[list[str], list[str]]:
    """The sources without files that an earlier one already is, and a warning if there are any.

    Records of a file that is read twice would have the same ids, or count twice.

    Args:
        sources: files, claims: and hub:, after folders and globs are expanded.
        setting: the config key that names them, for the warning.
    """
    first: dict[object, str] = {}
    repeated = []
    for source in sources:
        identity = _identity(source)
        if identity in first:
            repeated.append(source if source == first[identity] else f"{source} is {first[identity]}")
        first.setdefault(identity, source)
    if not repeated:
        return list(sources), []
    verb = "is" if len(repeated) == 1 else "are"
    message = f"{len(repeated)} of {len(sources)} files {verb} given twice, and read once: {_names(repeated)}."
    return list(first.values()), [f"{setting}: {message}"]


def overlap_warnings(splits: Mapping[str, Split], *, new: Iterable[str], held_out: bool) -> list[str]:
    """A warning for every two splits that share files, prompts or ids.

    Args:
        splits: by name.
        new: the splits that were not yet compared.
        held_out: whether train and val are parts of the same files; they are then divided by prompt.
    """
    new = set(new)
    names = [name for name in _COMPARED if name in splits]
    return [
        warning
        for first, second in itertools.combinations(names, 2)
        if {first, second} & new and not (held_out and second == "val")
        for warning in _compare(first, splits[first], second, splits[second])
    ]


def training_prompt_warnings(records: Sequence[Record], test: Split) -> list[str]:
    """The warning about prompts that test shares with the records of train_files, which are not a split of this run."""
    prompt_hashes = np.fromiter(map(prompt_hash, records), np.uint64)
    counts = {"prompts": (num_shared(test.prompt_hashes, prompt_hashes), len(test.examples))}
    return _warnings("train", "test", counts)


def _compare(first_name: str, first: Split, second_name: str, second: Split) -> list[str]:
    identities = {_identity(source) for source in first.sources}
    files = [source for source in second.sources if _identity(source) in identities]
    counts = {
        f"files ({_names(files)})": (len(files), len(second.sources)),
        "prompts": (num_shared(second.prompt_hashes, first.prompt_hashes), len(second.examples)),
        "ids": (num_shared(second.id_hashes, first.id_hashes), len(second.examples)),
    }
    return _warnings(first_name, second_name, counts)


def _warnings(first_name: str, second_name: str, counts: Mapping[str, tuple[int, int]]) -> list[str]:
    """A warning that lists the counts above zero; none if all are zero.

    Args:
        first_name: of a split.
        second_name: of the split that shares something with it.
        counts: what is shared -> how many of how many of the second split.
    """
    shared = [f"{count:,} of its {total:,} {what}" for what, (count, total) in counts.items() if count]
    if not shared:
        return []
    consequence = "An id should name one record."
    if counts["prompts"][0]:
        purpose = {"train": "the model was trained on", "val": "the best checkpoint was chosen by"}[first_name]
        consequence = f"The {second_name} metrics then measure records that {purpose}; remove them from one of the two."
    return [f"data.{second_name}_files shares with data.{first_name}_files: {', '.join(shared)}. {consequence}"]


def num_shared(hashes: ArrayLike, others: ArrayLike) -> int:
    """How many of the hashes are among the others; 0 means no hash.

    >>> num_shared(np.array([7, 7, 5, 0]), np.array([9, 7, 0]))
    2
    """
    others = np.asarray(others)
    values, counts = np.unique(np.asarray(hashes), return_counts=True)
    counts[values == 0] = 0
    is_shared = np.zeros(len(values), bool)
    for start in range(0, len(others) if len(values) else 0, _CHUNK):
        chunk = others[start : start + _CHUNK]
        places = np.searchsorted(values, chunk).clip(max=len(values) - 1)
        is_shared[places[values[places] == chunk]] = True
    return int(counts[is_shared].sum())


def _identity(source: str) -> object:
    """Equal for two paths of the same file, through links too."""
    if source.startswith(("claims:", "hub:")):
        return source
    path = Path(source).expanduser()
    try:
        stat = path.stat()
    except OSError:
        return str(path.absolute())
    return (stat.st_dev, stat.st_ino) if stat.st_ino else os.path.realpath(path)


def _names(names: Sequence[str]) -> str:
    """At most three names.

    >>> _names(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    shown = ", ".join(names[:_MAX_NAMES])
    return f"{shown} and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else shown
