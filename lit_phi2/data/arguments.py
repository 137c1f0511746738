"""Checks of the data module's arguments, before any file is read.

>>> check_choice(("error", "skip"), on_bad_record="ignore")
Traceback (most recent call last):
lit_phi2.errors.InputError: data.on_bad_record: 'ignore' is unknown; expected 'error' or 'skip'.
"""

from collections.abc import Sequence

from lit_phi2.data.chat import TURNS
from lit_phi2.data.encode import ON_OVERLONG
from lit_phi2.data.readers.encodings import check_encoding
from lit_phi2.errors import InputError
from lit_phi2.utils.paths import expand_user

DEFAULT_VAL_FRACTION = 0.1

STDIN_SOURCE = "-"
AUTO = "auto"

Files = str | list[str] | None


def check_reading(turns: str, encoding: str | None, on_overlong: str, on_bad_record: str) -> None:
    """Refuse an unknown turns, encoding, on_overlong or on_bad_record.

    Raises:
        InputError: names the argument.
    """
    check_choice(TURNS, turns=turns)
    check_encoding(encoding)
    check_choice(ON_OVERLONG, on_overlong=on_overlong)
    check_choice(("error", "skip"), on_bad_record=on_bad_record)


def check_choice(choices: Sequence[str], **values: str) -> None:
    """Refuse a value that is not one of the choices.

    Raises:
        InputError: names the argument.
    """
    for name, value in values.items():
        if value not in choices:
            *others, last = map(repr, choices)
            raise InputError(f"data.{name}: {value!r} is unknown; expected {', '.join(others)} or {last}.")


def check_minimum(minimum: int, **values: int) -> None:
    """Refuse a value below the minimum.

    Raises:
        InputError: names the argument.
    """
    for name, value in values.items():
        if value < minimum:
            raise InputError(f"data.{name}: {value} is less than {minimum}.")


def rows(batch_size: int | str) -> int:
    """The rows of a micro-batch; 1 for auto, until they are chosen.

    Raises:
        InputError: neither auto nor a number from 1 on.
    """
    if batch_size == AUTO:
        return 1
    if isinstance(batch_size, str):
        raise InputError(f"data.batch_size: {batch_size!r} is unknown; expected a number of rows, or {AUTO}.")
    check_minimum(1, batch_size=batch_size)
    return batch_size


def check_val_fraction(val_fraction: float, val_files: Files) -> None:
    """Refuse a fraction that is out of range, or has no effect.

    Raises:
        InputError: names val_fraction.
    """
    if not 0 < val_fraction < 1:
        raise InputError(f"data.val_fraction: {val_fraction} is not between 0 and 1.")
    if val_fraction != DEFAULT_VAL_FRACTION and val_files is not None:
        raise InputError(
            f"data.val_fraction: {val_fraction} has no effect while data.val_files is {val_files!r}. "
            "Set data.val_files to null, or leave val_fraction out."
        )


def list_sources(split_name: str, files: Files) -> list[str]:
    """The sources that the argument names, with ~ replaced by the home folder.

    Raises:
        InputError: there is none, one is empty, one is in the home folder of an unknown user, or one is standard input
            where that cannot be read.
    """
    sources = [files] if isinstance(files, str) else list(files or [])
    if not sources or not all(sources):
        raise InputError(f"data.{split_name}_files: is empty; expected a path or a list of paths.")
    setting = f"data.{split_name}_files"
    if STDIN_SOURCE in sources and split_name != "predict":
        raise InputError(f"{setting}: - is standard input, which only predict_files can be. Give a file.")
    return [str(expand_user(source, setting)) if source.startswith("~") else source for source in sources]
