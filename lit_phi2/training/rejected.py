"""rejected.jsonl: the records that a run leaves out, invalid or overlong, each with its location and reason.

    {"split": "train", "location": "claims.jsonl:7", "message": "'response' is empty", "record": "{...}"}

The subcommands of a run share the file: each replaces the lines of its own splits and keeps those of other splits.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_phi2.data.splits import Split
from lit_phi2.utils.files import atomic_write, read_json_lines
from lit_phi2.utils.locks import file_lock

log = logging.getLogger(__name__)


def write_rejected(splits: Mapping[str, Split], folder: Path) -> None:
    """Write the records left out of these splits; no file is left if there are none."""
    file = folder / "rejected.jsonl"
    rows = [
        {"split": name, "location": invalid.location, "message": invalid.message, "record": invalid.raw}
        for name, split in splits.items()
        for invalid in split.left_out
    ]
    if rows:
        log.warning("records left out: %d, each with its reason in %s", len(rows), file)
    if [row for row in _read(file) if row.get("split") in splits] == rows:
        return
    with file_lock(folder / "rejected.lock", waiting=f"{file}: waiting for another run that is writing it"):
        rows = [row for row in _read(file) if row.get("split") not in splits] + rows
        if rows:
            atomic_write(file, [json.dumps(row, ensure_ascii=False) + "\n" for row in rows])
        else:
            file.unlink(missing_ok=True)


def _read(file: Path) -> list[dict[str, Any]]:
    return list(read_json_lines(file)) if file.is_file() else []
