"""Encodings: the first bytes of a file -> the codec that decodes it; bytes in another encoding -> its likely name.

    EF BB BF, FF FE, FE FF, ...     utf-8-sig, utf-16, utf-32: a byte order mark decides, whatever data.encoding is
    other bytes                     data.encoding; utf-8 if it is null

A file without a mark is never decoded by a guess: a wrong one would change texts silently. A guess only completes the
message that refuses the file.
"""

import codecs
import re

from lit_phi2.errors import InputError

_MARKS = (  # UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

_CANDIDATES = ("cp1252", "mac_roman", "cp850")  # Windows, old Macs, and "CSV (MS-DOS)" of Excel
_PLAUSIBLE_SYMBOLS = set("\u2018\u2019\u201c\u201d\u2013\u2014\u2026\u2022\u20ac\u2122\xa0¡£§©«°±²³·»¼½¾¿®")
_BESIDE_NON_ASCII = re.compile(r"(?s)(?=(.)([^\x00-\x7f])(.))")


def check_encoding(name: str | None) -> None:
    """Check the value of data.encoding.

    Raises:
        InputError: Python has no such encoding of text.
    """
    if name is None:
        return
    try:
        b"a".decode(name)  # refuses codecs that do not decode to text, such as hex
        codecs.getincrementaldecoder(name)
    except (LookupError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):  # an encoding of more bytes in a character, such as utf-16
            return
        raise InputError(
            f"data.encoding: {name!r} is unknown; expected one such as 'cp1252', 'latin-1', 'mac_roman' or "
            "'utf-16-le', as Python names them."
        ) from error


def choose_codec(head: bytes, encoding: str | None) -> str:
    """The codec of a file.

    Args:
        head: its first bytes, at least four where the file has as many.
        encoding: data.encoding.
    """
    for mark, codec in _MARKS:
        if head.startswith(mark):
            return codec
    return codecs.lookup(encoding or "utf-8").name


def guess_wide_codec(head: bytes) -> str | None:
    """utf-16-le or utf-16-be if every other byte is mostly zero, as in UTF-16 without a byte order mark.

    >>> guess_wide_codec('{"id": 1}'.encode("utf-16-be"))
    'utf-16-be'
    """
    even, odd = head[0::2], head[1::2]
    if len(odd) < 2:
        return None
    if odd.count(0) > 0.4 * len(odd) and not even.count(0):
        return "utf-16-le"
    return "utf-16-be" if even.count(0) > 0.4 * len(even) and not odd.count(0) else None


def guess_codec(sample: bytes) -> str | None:
    """The encoding of Western text that is not UTF-8; None if no candidate reads as text.

    Each candidate is scored by the characters beyond ASCII that it finds: 1 for one that is plausible where it is
    (an accented letter in a word, in the case of its word; a typographic quote), -1 for another.

    Args:
        sample: lines that UTF-8 cannot decode.

    >>> guess_codec("Café — déjà vu".encode("mac_roman"))
    'mac_roman'
    """
    scores = {codec: _plausibility(sample, codec) for codec in _CANDIDATES}
    best = max(_CANDIDATES, key=lambda codec: scores[codec])  # the first of equal ones
    return best if scores[best] > 0 else None


def _plausibility(sample: bytes, codec: str) -> int:
    try:
        text = sample.decode(codec)
    except UnicodeDecodeError:
        text = sample.decode(codec, "replace")  # a replacement is not plausible
    return sum(1 if _is_plausible(*match.groups()) else -1 for match in _BESIDE_NON_ASCII.finditer(f" {text} "))


def _is_plausible(previous: str, character: str, following: str) -> bool:
    if not character.isalpha():
        return character in _PLAUSIBLE_SYMBOLS
    is_beside_ascii = any(other.isascii() and other.isalpha() for other in (previous, following))
    return is_beside_ascii and not (character.isupper() and previous.islower())
