"""Duplicate ids: where an id was used before.

    "c-17" at claims.jsonl:17   ->  None
    "c-17" at claims.jsonl:90   ->  "claims.jsonl:17"

The index is an SQLite table of 64-bit hashes in memory. Records are private, so neither an id nor a database file is
written to disk. Among ten million different ids, two share a hash once in 370,000 times.

Peak memory and time per id (growth of VmHWM in /proc/self/status; one process and one thread per case, on 2 shared CPU
cores, the first two alternating; CPython 3.11, ids of 15 characters, one in a thousand used before):

                                         1 million ids       5 million ids
    SQLite, WITHOUT ROWID                27 bytes  3.3 us    26 bytes  4.3 us
    sorted NumPy runs, 20 bytes an id    44 bytes  2.4 us    71 bytes  4.6 us     merging two runs copies both
    dict of hashes                      185 bytes  1.8 us   176 bytes  2.9 us
"""

import sqlite3
from collections.abc import Sequence

Position = tuple[int, int, int]  # index of the source, line, column; column 0 means that the line holds one record


class DuplicateIdIndex:
    """The position of the first use of every id.

    Args:
        sources: as named in the config; the first item of a Position is an index into them.
    """

    def __init__(self, sources: Sequence[str]) -> None:
        self.sources = sources
        self._database = sqlite3.connect(":memory:")
        self._database.execute(
            "CREATE TABLE uses (hash INTEGER PRIMARY KEY, source INTEGER, line INTEGER, col INTEGER) WITHOUT ROWID"
        )

    def add(self, record_id: str, position: Position) -> str | None:
        """The location of the first use of the id, `path:line`; None if this is the first."""
        key = hash(record_id)
        insert = self._database.execute("INSERT OR IGNORE INTO uses VALUES (?, ?, ?, ?)", (key, *position))
        if insert.rowcount:
            return None
        select = self._database.execute("SELECT source, line, col FROM uses WHERE hash = ?", (key,))
        source, line, column = select.fetchone()
        return f"{self.sources[source]}:{line}" + (f":{column}" if column else "")
