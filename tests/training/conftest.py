"""Fixtures of the training tests: twelve records as a file, and the scalars of a run."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@pytest.fixture
def train_file(write_jsonl: Callable[..., Path], record_rows: list[dict[str, str]]) -> Path:
    return write_jsonl(list(record_rows))


@pytest.fixture
def read_events() -> Callable[[Path], EventAccumulator]:
    """Reads the event file of a run's folder."""
    return lambda folder: EventAccumulator(str(folder)).Reload()
