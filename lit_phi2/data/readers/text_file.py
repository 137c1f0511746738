r"""Text files: a path -> its lines, decoded.

    b'{"id": "caf\xc3\xa9"}\r\n'     ->  '{"id": "café"}\r\n'
    b'{"id": "caf\xe9"}\r\n'         ->  UndecodableLine, in a file that is otherwise UTF-8
                                     ->  InputError, in a file that is in another encoding

A line ends at \n, and at nothing else that Unicode calls a line end: a record may contain U+2028, U+0085 or \r.

A file is in another encoding if, of its lines beyond ASCII, more are not UTF-8 than are; unless these are few and do
not look like text in any encoding. It is refused once, with the likely encoding and the first place that shows it. In a
file of UTF-8, each line that cannot be decoded costs one record.
"""

import codecs
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lit_phi2.data.readers.encodings import check_encoding, choose_codec, guess_codec, guess_wide_codec
from lit_phi2.data.readers.files import STDIN, check_signature, open_bytes
from lit_phi2.data.readers.rows import UnparsableRow
from lit_phi2.data.text import is_valid_unicode
from lit_phi2.errors import InputError

_MAX_SAMPLE_BYTES = 2**16  # from which an encoding is guessed
_MAX_DAMAGED = 0.1  # share of lines; if more are neither UTF-8 nor recognized, the file is in an unknown encoding
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")  # how surrogateescape decodes a byte that is not UTF-8
_MARK = "\ud800"  # cannot be decoded from a file


class UndecodableLine(str):
    """A line of a UTF-8 file with bytes that are not UTF-8, each decoded as half of a surrogate pair."""


class TextFile:
    """An open file of text.

    Args:
        path: for messages, and to read the file again where it cannot be decoded.
        file: its bytes.
        encoding: data.encoding.
    """

    def __init__(self, path: Path, file: io.BufferedReader, encoding: str | None) -> None:
        check_encoding(encoding)
        check_signature(path, file)
        self.path = path
        self.encoding = encoding
        self.has_undecodable = False
        self._head = file.peek(4096)
        self.codec = choose_codec(self._head, encoding)
        self._is_utf8 = self.codec in ("utf-8", "utf-8-sig")
        if self.codec == "utf-8" and (wide := guess_wide_codec(self._head[:4096])):
            raise InputError(f"{path}:1: is not UTF-8 but probably UTF-16. Set data.encoding to {wide}.")
        errors = "surrogateescape" if self._is_utf8 else "strict"
        self._stream = io.TextIOWrapper(file, self.codec, errors, newline="\n")
        self._is_stdin = str(path) == STDIN
        # A byte order mark says what it is; standard input cannot be read again to find out.
        self._is_checked = self.codec == "utf-8-sig" or self._is_stdin

    def head(self) -> str:
        """The first few thousand characters; the last of them may be cut off."""
        decoder = codecs.getincrementaldecoder(self.codec)("ignore")
        return decoder.decode(self._head)

    def lines(self, line_end: str = "\n") -> Iterator[str]:
        """The lines with their ends.

        Args:
            line_end: a line feed, or a carriage return for files of old Macs.

        Raises:
            InputError: the file is in another encoding.
        """
        self._stream.reconfigure(newline=line_end)
        try:
            for line in self._stream:
                yield line if line.isascii() else self._check(line)
        except UnicodeError as error:
            raise self._undecodable() from error

    def read(self) -> str:
        """The whole text.

        Raises:
            InputError: the file is in another encoding.
        """
        try:
            return self._check(self._stream.read())
        except UnicodeError as error:
            raise self._undecodable() from error

    def _check(self, text: str) -> str:
        """The text, marked if it cannot be decoded."""
        if self._is_utf8 and not is_valid_unicode(text):
            if not self._is_checked:
                _check_is_utf8(self.path)
            self._is_checked = self.has_undecodable = True
            return UndecodableLine(text)
        if not self._is_utf8 and not self._is_checked and not text.isascii():
            self._check_is_not_utf8(text)
            self._is_checked = True
        return text

    def _check_is_not_utf8(self, text: str) -> None:
        """Check the first text beyond ASCII: bytes of another encoding are hardly ever valid UTF-8."""
        try:
            encoded = text.encode(self.codec)
            encoded.decode("utf-8")
        except UnicodeError:
            return
        if len(encoded) == len(text):  # one byte for a character, so the file has no byte order mark
            raise self._is_utf8_error()

    def _is_utf8_error(self) -> InputError:
        return InputError(
            f"{self.path}: is UTF-8, and data.encoding {self.encoding!r} would read it as other characters. Leave "
            "data.encoding out; of files in several encodings, save all as UTF-8."
        )

    def _undecodable(self) -> InputError:
        """The error that names the first place which the codec cannot decode."""
        if self._is_stdin:
            return InputError(f"{self.path}: cannot be decoded as {self.codec}. Give UTF-8, or set data.encoding.")
        if self.encoding and _is_utf8(self.path):
            return self._is_utf8_error()
        codecs.register_error("lit_phi2.mark", lambda error: (_MARK, _error_end(error)))
        with open_bytes(self.path) as file:
            lines = io.TextIOWrapper(file, self.codec, "lit_phi2.mark", newline="\n")
            places = (
                f":{number}: cannot be decoded as {self.codec} at column {line.index(_MARK) + 1}"
                for number, line in enumerate(lines, start=1)
                if _MARK in line
            )
            place = next(places, f": cannot be decoded as {self.codec}")
        if self.encoding and not self.codec.startswith(("utf-16", "utf-32")):
            cure = f"Set data.encoding, now {self.encoding!r}, to the encoding that the file has."
        else:
            cure = "The file is cut off or damaged; copy it again, or save it as UTF-8."
        return InputError(f"{self.path}{place}. {cure}")


@contextmanager
def open_text(path: Path, encoding: str | None) -> Iterator[TextFile]:
    """Open a file of text, compressed or not.

    Raises:
        InputError: while the file is opened or read: it cannot be read or is in another encoding.
    """
    with open_bytes(path) as file:
        yield TextFile(path, file, encoding)


def undecodable_row(text: str) -> UnparsableRow:
    """The row of a text with bytes that are not UTF-8."""
    match = _ESCAPED_BYTE.search(text)
    assert match is not None
    raw = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace").rstrip("\r\n")
    return UnparsableRow(f"is not UTF-8 at column {match.start() + 1}, unlike other lines. Save it as UTF-8.", raw)


def has_undecodable(text: str) -> bool:
    return _ESCAPED_BYTE.search(text) is not None


def _check_is_utf8(path: Path) -> None:
    """Check that a file with lines that are not UTF-8 is not in another encoding.

    Raises:
        InputError: it is.
    """
    number, num_utf8, num_other, first, sample = 0, 0, 0, "", b""
    with open_bytes(path) as file:
        head = file.peek(4096)[:4096]
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                num_other += 1
                column = len(line[: error.start].decode("utf-8")) + 1
                first = first or f"{path}:{number}: is not UTF-8 (byte 0x{line[error.start]:02x} at column {column})"
                sample += line[max(0, error.start - 100) :][: _MAX_SAMPLE_BYTES - len(sample)]
            else:
                num_utf8 += not line.isascii()
    codec = guess_wide_codec(head) or guess_codec(sample)
    if num_utf8 >= num_other or (codec is None and num_other <= _MAX_DAMAGED * number):
        return
    if codec:
        name = f"{codec}, which includes latin-1" if codec == "cp1252" else codec
        raise InputError(f"{first} but probably {name}. Set data.encoding to {codec}, or save the file as UTF-8.")
    raise InputError(
        f"{first}, and its encoding is not recognized. Save the file as UTF-8, or set data.encoding to its encoding, "
        "such as cp1251 or gb18030."
    )


def _is_utf8(path: Path) -> bool:
    with open_bytes(path) as file:
        try:
            for line in file:
                line.decode("utf-8")
        except UnicodeDecodeError:
            return False
    return True


def _error_end(error: UnicodeError) -> int:
    return error.end if isinstance(error, UnicodeDecodeError) else 0
