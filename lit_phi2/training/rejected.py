"""rejected.jsonl: the records that a run leaves out, invalid or overlong, each with its location and reason.

    {"split": "train", "location": "claims.jsonl:7", "message": "'response' is empty", "record": "{...}"}

The subcommands of a run share the file: each replaces the lines of its own splits and keeps those of other splits.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from lit_phi2.data.splits import Split
from lit_phi2.utils.files import atomic_write

log = logging.getLogger(__name__)


def write_rejected(splits: Mapping[str, Split], folder: Path) -> None:
    """Write the records left out of these splits; no file if there are none."""
    file = folder / "rejected.jsonl"
    rows = [
        {"split": name, "location": invalid.location, "message": invalid.message, "record": invalid.raw}
        for name, split in splits.items()
        for invalid in split.left_out
    ]
    if not rows:
        return
    log.warning("records left out: %d, each with its reason in %s", len(rows), file)
    if file.is_file():
        earlier = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        rows = [row for row in earlier if row["split"] not in splits] + rows
    atomic_write(file, [json.dumps(row, ensure_ascii=False) + "\n" for row in rows])
