"""Fixtures of the command line's tests: fit on a small base and twelve records, and the checkpoint it writes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_phi2.cli.main import main


@pytest.fixture
def fit(
    phi_dir: Path,
    write_jsonl: Callable[..., Path],
    record_rows: list[dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., int]:
    """Runs fit with small.yaml in an empty folder; returns the exit code."""
    records = write_jsonl(record_rows)
    monkeypatch.chdir(tmp_path)
    settings = {
        "model": {"base": str(phi_dir), "max_new_tokens": 4, "dtype": "float32"},
        "data": {"train_files": str(records), "val_files": str(records), "packing": False, "max_length": 128},
        "trainer": {"max_epochs": 2, "accelerator": "cpu"},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings))
    return lambda *arguments: main(["fit", "--config", "small.yaml", *arguments])


@pytest.fixture
def read_last() -> Callable[..., dict[str, Any]]:
    """Reads last.ckpt of a run's folder."""

    def read(folder: str = "runs/small/version_0") -> dict[str, Any]:
        return torch.load(Path(folder) / "checkpoints" / "last.ckpt", weights_only=True)

    return read
