"""Identity: digests by which a record is recognised without its text or its id.

    instruction, input, response   ->  content digest    equal in every format, under every id and in every file
    row that is no record          ->  content digest    of its text as it is in the file
    id                             ->  id digest

They are SHA-256 in hexadecimal. What leaves a run has them salted (`audit/ledger.py`): a claim number is guessed in
seconds from a digest without a salt.
"""

import hashlib


def content_digest(instruction: str, input: str, response: str) -> str:
    """Of the texts of a record; their lengths keep them apart.

    >>> content_digest("ab", "c", "d") == content_digest("a", "bc", "d")
    False
    """
    sha256 = hashlib.sha256()
    for text in (instruction, input, response):
        content = text.encode()
        sha256.update(f"{len(content)} ".encode() + content)
    return sha256.hexdigest()


def raw_digest(raw: str) -> str:
    """Of the text of a row that is no record."""
    return hashlib.sha256(b"raw " + raw.encode("utf-8", "surrogatepass")).hexdigest()


def id_digest(record_id: str) -> str:
    """Of an id."""
    return hashlib.sha256(b"id " + record_id.encode("utf-8", "surrogatepass")).hexdigest()
