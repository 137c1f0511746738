"""JSON objects: read one from a file that anybody may have written, and check the kinds of its values.

    path              -> dict, or an InputError that names the file and what it holds instead
    dict, table       -> an InputError that names the first key whose value is of another kind or out of range

    >>> check_values({"r": "two"}, {"r": integer(1, 8)}, source="adapter_config.json")
    Traceback (most recent call last):
    lit_phi2.errors.InputError: adapter_config.json: r is 'two'; expected an integer from 1 to 8.

Python's json accepts NaN and Infinity, and a bool is an int there; neither passes here.
"""

import json
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_phi2.errors import InputError


@dataclass(frozen=True, slots=True)
class Kind:
    """What a value must be.

    Attributes:
        description: for messages.
        matches: whether a value is of this kind.
    """

    description: str
    matches: Callable[[Any], bool]


TEXT = Kind("a text", lambda value: isinstance(value, str))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
TEXTS = Kind(
    "a list of texts, not empty",
    lambda value: isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value),
)


def integer(low: int, high: int) -> Kind:
    """An integer in [low, high]."""
    return Kind(f"an integer from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def number(low: float, high: float, *, above_low: bool = False) -> Kind:
    """A finite number in [low, high], or in (low, high]."""

    def matches(value: Any) -> bool:
        is_number = type(value) in (int, float) and math.isfinite(value)
        return is_number and low <= value <= high and not (above_low and value == low)

    return Kind(f"a number {'above' if above_low else 'from'} {low:g} {'up ' * above_low}to {high:g}", matches)


def one_of(*values: str | bool) -> Kind:
    """One of these texts or booleans."""
    names = " or ".join(map(describe, values)) if len(values) < 4 else "one of " + ", ".join(map(str, values))
    return Kind(names, lambda value: any(type(value) is type(item) and value == item for item in values))


def nullable(kind: Kind) -> Kind:
    """A value of this kind, or null."""
    return Kind(f"{kind.description}, or null", lambda value: value is None or kind.matches(value))


def read_json_object(path: Path, *, setting: str = "") -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: the file.
        setting: the key or flag that names the file; the message begins with it.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    source = f"{setting}: {path}" if setting else str(path)
    try:
        value = json.loads(path.read_text("utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
        raise InputError(f"{source}: is not valid JSON ({error}); expected an object.") from error
    if not isinstance(value, dict):
        raise InputError(f"{source}: holds {describe(value)}; expected a JSON object.")
    return value


def check_values(
    values: Mapping[str, Any], kinds: Mapping[str, Kind], *, source: str, required: Iterable[str] = ()
) -> None:
    """Check the values of an object; keys that the table lacks are not checked.

    Args:
        values: the object.
        kinds: key -> kind of its value.
        source: where the object is, for messages.
        required: keys that must be there.

    Raises:
        InputError: names the first key that is absent or has a value of another kind.
    """
    for key in required:
        if key not in values:
            raise InputError(f"{source}: has no {key}; expected {kinds[key].description}.")
    for key, kind in kinds.items():
        if key in values and not kind.matches(values[key]):
            raise InputError(f"{source}: {key} is {describe(values[key])}; expected {kind.description}.")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def describe(value: Any) -> str:
    """A value as a message shows it: a list or object by its kind alone."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'}{'' if value else ' that is empty'}"
    return reprlib.repr(value)
