"""Fixtures of tests/data: token counts as claims have them, and a data module on records."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lit_phi2.data.datamodule import ClaimsDataModule


@pytest.fixture(scope="session")
def lengths() -> list[int]:
    """Tokens of 400 examples: log-normal around 140, the few long ones at 512."""
    drawn = np.random.default_rng(0).lognormal(np.log(140), 0.6, size=400)
    return np.clip(drawn, 20, 512).astype(int).tolist()


@pytest.fixture(scope="session")
def supervised(lengths: list[int]) -> list[int]:
    """Between one token and all but five of each example."""
    generator = random.Random(0)
    return [generator.randint(1, length - 5) for length in lengths]


@pytest.fixture
def claims(phi_dir: Path, write_jsonl: Callable[..., Path]) -> Callable[..., ClaimsDataModule]:
    """A data module on the small base; a list of records in place of a path is written to a file first."""

    def new_datamodule(**options: object) -> ClaimsDataModule:
        for name, value in options.items():
            if name.endswith("_files") and isinstance(value, list):
                options[name] = str(write_jsonl(value, f"{name}.jsonl"))
        return ClaimsDataModule(**{"base": str(phi_dir), "val_files": None, **options})

    return new_datamodule
