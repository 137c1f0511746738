"""Ledger of a run: what the Trainer and the data module know, for `audit/ledger.py`.

Trainer.global_step, splits of the data module  ->  StepsTaken, splits  ->  ledger.parquet, test_ledger.parquet
"""

import logging
from pathlib import Path

import lightning.pytorch as pl

from lit_phi2.audit.ledger import (
    KEY_FILE,
    LEDGER_FILE,
    TEST_LEDGER_FILE,
    StepsTaken,
    create_key,
    read_key,
    write_ledger,
)
from lit_phi2.audit.provenance import PROVENANCE_FILE, sha256_of
from lit_phi2.training.protocols import training_data

log = logging.getLogger(__name__)


def open_ledger(trainer: pl.Trainer, run_dir: Path, replaced: Path | None) -> None:
    """Give a run its salt, unless it has one.

    Args:
        trainer: only its rank 0 writes.
        run_dir: the folder of the run.
        replaced: the folder of the run whose config this one has, if there is one.
    """
    if not trainer.is_global_zero:
        return
    replaces = None
    if replaced is not None and replaced.resolve() != run_dir.resolve():
        files = [file for file in (replaced / PROVENANCE_FILE, replaced / LEDGER_FILE) if file.is_file()]
        name = "/".join(replaced.resolve().parts[-2:])  # run_name/version_0
        replaces = {"run": name, "sha256": {file.name: sha256_of(file) for file in files}}
    create_key(run_dir, training_data(trainer).splits.values(), replaces)


def write_fit_ledger(trainer: pl.Trainer, run_dir: Path) -> None:
    """Write the ledger of training and validation, with the steps taken so far; only rank 0 writes."""
    if not trainer.is_global_zero:
        return
    data = training_data(trainer)
    loss_scale = trainer.lightning_module.loss_scale
    taken = StepsTaken(
        data.batching(),
        data.seed,
        trainer.global_step,
        data.steps_per_epoch(),
        repeats_epoch=trainer.overfit_batches > 0,
        skipped=() if loss_scale is None else tuple(loss_scale.skipped_steps),
    )
    splits = {name: data.splits[name] for name in ("train", "val")}
    (run_dir / PROVENANCE_FILE).unlink(missing_ok=True)  # which has the digest of the old one
    write_ledger(run_dir / LEDGER_FILE, splits, read_key(run_dir)["salt"], taken)
    log.info("ledger: %s", run_dir / LEDGER_FILE)


def write_test_ledger(trainer: pl.Trainer, run_dir: Path) -> None:
    """Write the ledger of the records that a run was tested on, if its folder has a salt; only rank 0 writes."""
    if trainer.is_global_zero and (run_dir / KEY_FILE).is_file():
        splits = {"test": training_data(trainer).splits["test"]}
        write_ledger(run_dir / TEST_LEDGER_FILE, splits, read_key(run_dir)["salt"])
