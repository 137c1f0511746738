"""Curves: the event files of a run -> the scalars that it logged, by name and step.

    events.out.tfevents*   ->   {"train/loss": Curve(steps [1 2 ...], values), "val/loss": Curve([0 20 ...], ...)}

A resumed run has several files. Where two have a step, the later one counts, as in TensorBoard.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_phi2.errors import InputError

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Curve:
    """A scalar over optimizer steps.

    Attributes:
        steps: (n,) int64, ascending.
        values: (n,) float64, finite.
    """

    steps: Array
    values: Array

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def lowest(self) -> int:
        """The index of the lowest value."""
        return int(self.values.argmin())


@dataclass(frozen=True, slots=True)
class Curves:
    """What a run logged.

    Attributes:
        scalars: by name.
        started: when the first event was written; None without one.
    """

    scalars: dict[str, Curve]
    started: datetime | None

    def get(self, name: str) -> Curve | None:
        """A curve with at least one value."""
        return self.scalars.get(name)


def read_curves(folder: Path) -> Curves:
    """The scalars of a run; none if it has no event file.

    Args:
        folder: of the run.

    Raises:
        InputError: a file is damaged.
    """
    points: dict[str, dict[int, float]] = {}
    started = math.inf
    for file in sorted(folder.glob("events.out.tfevents*")):
        if file.suffix in (".new", ".lock"):
            continue
        for event in _events(file):
            started = min(started, event.wall_time or math.inf)
            for value in event.summary.value:
                if value.WhichOneof("value") == "simple_value":
                    points.setdefault(value.tag, {})[event.step] = value.simple_value
    curves = {tag: _to_curve(values) for tag, values in points.items()}
    when = datetime.fromtimestamp(started, UTC) if math.isfinite(started) else None
    return Curves({tag: curve for tag, curve in curves.items() if len(curve)}, when)


def _events(file: Path) -> Iterator[Any]:
    from google.protobuf.message import DecodeError  # slow to import, as tensorboard is
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    try:
        for record in RawEventFileLoader(str(file)).Load():  # stops at a record that a kill cut short
            yield Event.FromString(record)
    except DecodeError as error:
        raise InputError(f"{file}: is damaged; expected an event file of TensorBoard.") from error


def _to_curve(values: dict[int, float]) -> Curve:
    steps = np.array(sorted(step for step, value in values.items() if math.isfinite(value)), np.int64)
    return Curve(steps, np.array([values[step] for step in steps.tolist()], np.float64))
