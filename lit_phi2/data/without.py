"""Without: the ids of data.without, which training and validation leave out as if their records had never been there.

    ids.txt   c-17\\n c-18\\n   ->  {digest of c-17: line 1, digest of c-18: line 2}
    an id that no record has    ->  InputError with its line

Messages have lines and not ids, which may be those of members.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from lit_phi2.data.identity import id_digest
from lit_phi2.data.splits import Split
from lit_phi2.errors import InputError
from lit_phi2.utils.paths import expand_user

_MAX_LINES = 10  # that a message names


def read_without(file: str | None) -> dict[str, int]:
    """The digest of each id in a file, with its line.

    Args:
        file: one id on each line, in UTF-8; None for no file.

    Raises:
        InputError: the file cannot be read, or has no id.
    """
    if file is None:
        return {}
    try:
        text = expand_user(file, "data.without").read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        raise InputError(f"data.without: {file} cannot be read ({reason}); expected one id on each line.") from error
    lines = {id_digest(line.strip()): number for number, line in enumerate(text.split("\n"), 1) if line.strip()}
    if not lines:
        raise InputError(f"data.without: {file} has no id; expected one on each line, or leave data.without out.")
    return lines


def check_found(file: str | None, lines: Mapping[str, int], splits: Iterable[Split]) -> None:
    """Check that every id is that of a record.

    Args:
        file: data.without, for the message.
        lines: from read_without.
        splits: train and val.

    Raises:
        InputError: names the lines of the ids that no record has.
    """
    found = {record.record_id for split in splits for record in split.forgotten}
    missing = sorted(line for digest, line in lines.items() if digest not in found)
    if missing:
        shown = ", ".join(map(str, missing[:_MAX_LINES]))
        more = f" and {len(missing) - _MAX_LINES} more" if len(missing) > _MAX_LINES else ""
        raise InputError(
            f"data.without: {len(missing)} of {len(lines)} ids in {os.fspath(Path(file or ''))} are those of no "
            f"record in data.train_files or data.val_files: line {shown}{more}. Correct them, or remove these lines."
        )
