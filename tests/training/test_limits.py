"""Settings that the number of batches decides: refused after the data is read, before a model or a folder.

Twelve records, unpacked: 12 batches an epoch, 12 optimizer steps.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import new_data, new_trainer
from lit_phi2.errors import InputError
from lit_phi2.training.module import LitPhi2


@pytest.fixture
def run(
    phi_dir: Path, write_jsonl: Callable[..., Path], record_rows: list[dict[str, str]], tmp_path: Path
) -> Callable[..., None]:
    """Runs a subcommand with settings of the Trainer."""

    def run(stage: str, **settings: Any) -> None:
        model = LitPhi2(base=str(phi_dir), dtype="float32", max_new_tokens=8)
        data = new_data(phi_dir, write_jsonl(record_rows), packing=False, test_files=str(tmp_path / "records.jsonl"))
        trainer = new_trainer(tmp_path / "runs", keep=True, **settings)
        try:
            getattr(trainer, stage)(model, data)
        except InputError:
            assert model.phi is None, "the model is not loaded"
            raise

    return run


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_check_interval": 13}, r"val_check_interval: 13 is above the 12 batches of an epoch; 1\.0 validates"),
        ({"val_check_interval": 6, "limit_train_batches": 5}, "val_check_interval: 6 is above the 5 batches"),
        (
            {"val_check_interval": 25, "check_val_every_n_epoch": None, "max_epochs": 2},
            "val_check_interval: 25 is above the 24 batches of the run",
        ),
        ({"check_val_every_n_epoch": 3, "max_epochs": 2}, "check_val_every_n_epoch: 3 is above the 2 epochs"),
        ({"check_val_every_n_epoch": 3, "max_steps": 13}, "check_val_every_n_epoch: 3 is above the 1 epochs"),
        ({"limit_val_batches": 0.05}, r"limit_val_batches: 0\.05 of 12 batches is less than one; .* at least 0\.083"),
        ({"limit_train_batches": 0.05}, r"limit_train_batches: 0\.05 of 12 batches is less than one"),
        ({"overfit_batches": 0.05}, r"overfit_batches: 0\.05 of 12 batches is less than one"),
        ({"min_steps": 13}, "min_steps: 13 is above the 12 optimizer steps of the run"),
    ],
)
def test_fit_refuses_what_its_batches_cannot_give(
    settings: dict[str, Any], message: str, run: Callable[..., None], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=rf"^trainer\.{message}"):
        run("fit", **settings)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"val_check_interval": 12},
        {"val_check_interval": 13, "check_val_every_n_epoch": None, "max_epochs": 2},
        {"val_check_interval": 13, "limit_val_batches": 0},
        {"check_val_every_n_epoch": 2, "max_epochs": 2},
        {"limit_val_batches": 0.09},
        {"fast_dev_run": True, "val_check_interval": 13, "check_val_every_n_epoch": 9},
    ],
    ids=str,
)
def test_fit_takes_what_its_batches_can_give(settings: dict[str, Any], run: Callable[..., None]) -> None:
    run("fit", **settings)


@pytest.mark.parametrize(("stage", "name"), [("validate", "val"), ("test", "test"), ("predict", "predict")])
@pytest.mark.parametrize("limit", [0, 0.01])
def test_other_subcommands_refuse_to_do_nothing(
    stage: str, name: str, limit: float, run: Callable[..., None], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=rf"^trainer\.limit_{name}_batches: {limit}"):
        run(stage, **{f"limit_{name}_batches": limit})
    assert not (tmp_path / "runs").exists()
