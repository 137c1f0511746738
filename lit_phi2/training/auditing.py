"""Auditing: the loss of every record under base and adapter, and the findings of the audit.

    split -> packed rows -> hidden states -> nats of each supervised token -> (n,) nats per token of each record

The passes are those of validation, without a gradient; only the sum is kept apart for each example of a row.
"""

import json
import logging
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lit_phi2.audit.duplicates import check_installed
from lit_phi2.audit.leakage import membership
from lit_phi2.audit.records import Array, AuditedRecords, audit_records, format_findings, to_row
from lit_phi2.data.collate import collate
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.data.schedule import BatchingConfig, evaluation_schedule
from lit_phi2.data.splits import Split
from lit_phi2.errors import InputError, LeakageError
from lit_phi2.model.phi2 import FusedPhiForCausalLM, packed_forward
from lit_phi2.training.module import LitPhi2
from lit_phi2.types import IGNORE_INDEX, Row
from lit_phi2.utils.console import print_text
from lit_phi2.utils.files import atomic_write

log = logging.getLogger(__name__)

RECORDS_FILE, LEAKAGE_FILE = "audit_records.jsonl", "audit_leakage.json"
TOP = 20  # findings of each kind on the terminal
_POSITIONS = 512  # whose logits are in memory at the same time


def check_audit(what: str, world_size: int) -> None:
    """Fail before a model is loaded, not after.

    Raises:
        InputError: an unknown audit, several processes, or a library is missing.
    """
    if what not in ("records", "leakage"):
        raise InputError(f"--what {what}: is unknown; expected records or leakage.")
    if world_size > 1:
        raise InputError("audit: runs on one device; give --trainer.devices 1.")
    if what == "records":
        check_installed()


def audit_split_records(model: LitPhi2, data: ClaimsDataModule, folder: Path) -> None:
    """Audit train and val, print the first findings of each kind and write all of them to audit_records.jsonl.

    Args:
        model: with the base and the adapter loaded.
        data: train and val are set up.
        folder: of the run.
    """
    audited = measure(model, data)
    findings = audit_records(audited)
    records, pairs = audited.records, zip(audited.base.tolist(), audited.adapter.tolist(), strict=True)
    losses = {record.location: pair for record, pair in zip(records, pairs, strict=True)}
    file = folder / RECORDS_FILE
    atomic_write(file, [json.dumps(to_row(finding, losses), ensure_ascii=False) + "\n" for finding in findings])
    print_text(format_findings(findings, TOP))
    log.info("audit: %d findings about %d records: %s", len(findings), len(records), file)


def audit_leakage(model: LitPhi2, data: ClaimsDataModule, folder: Path, max_auc: float) -> None:
    """Print whether records of train can be told from those of val, and write it to audit_leakage.json.

    Args:
        model: with the base and the adapter loaded.
        data: train and val are set up.
        folder: of the run.
        max_auc: the highest AUC that passes, compared with the lower end of its interval.

    Raises:
        LeakageError: the adapter is beyond it; the file is written.
    """
    audited = measure(model, data)
    drops, is_member = audited.base - audited.adapter, np.array([split == "train" for split in audited.splits])
    rates = membership(drops[is_member], drops[~is_member])
    passed = rates["auc"].low <= max_auc
    result = {
        "membership": {name: asdict(rate) for name, rate in rates.items()},
        "records": {"train": int(is_member.sum()), "val": int((~is_member).sum())},
        "max_auc": max_auc,
        "passed": passed,
    }
    file = folder / LEAKAGE_FILE
    atomic_write(file, json.dumps(result, indent=2) + "\n")
    for name, rate in rates.items():
        print_text(f"membership {name} {rate}")
    log.info("leakage audit: %s", file)
    if not passed:
        raise LeakageError(
            f"records of data.train_files can be told from those of val_files: AUC {rates['auc']}, above --max_auc "
            f"{max_auc}. Train fewer epochs, lower model.lora_r or model.learning_rate, or set data.redact."
        )


def measure(model: LitPhi2, data: ClaimsDataModule) -> AuditedRecords:
    """The records of train and val with their losses under base and adapter."""
    assert model.phi is not None
    names = [name for name in ("train", "val") if name in data.splits]
    splits = [data.splits[name] for name in names]
    batching = BatchingConfig(data.max_length, data.packing, data.batch_size)
    adapter = np.concatenate([record_losses(model.fused_phi, split, batching) for split in splits])
    log.info("audit: %d records measured under the adapter", len(adapter))
    with model.phi.disable_adapter():
        base = np.concatenate([record_losses(model.fused_phi, split, batching) for split in splits])
    log.info("audit: %d records measured under the base", len(base))
    records = [record for split in splits for record in split.records]
    split_names = [name for name, split in zip(names, splits, strict=True) for _ in split.records]
    return AuditedRecords(records, split_names, base, adapter)


@torch.inference_mode()
def record_losses(phi: FusedPhiForCausalLM, split: Split, batching: BatchingConfig) -> Array:
    """(n,) nats per supervised token of each example, in packed rows, in eval mode.

    Args:
        phi: with the adapter, or with it disabled.
        split: that is set up.
        batching: of data.max_length, packing and batch_size.
    """
    was_training = phi.training
    phi.eval()
    nats = np.zeros(len(split.examples))
    device = next(phi.parameters()).device
    for micro in evaluation_schedule(split.lengths, batching):
        batch = collate(split.examples, micro.rows).to(device)
        hidden = packed_forward(phi, batch.input_ids, batch.position_ids)
        owner = _owners(split, micro.rows, batch.input_ids.shape)
        is_scored = batch.labels[:, 1:] != IGNORE_INDEX
        values = _token_nats(hidden[:, :-1][is_scored], batch.labels[:, 1:][is_scored], phi)
        np.add.at(nats, owner[:, 1:][is_scored.cpu()].numpy(), values.double().cpu().numpy())
    phi.train(was_training)
    return nats / np.maximum(split.supervised, 1)


def _owners(split: Split, rows: tuple[Row, ...], size: torch.Size) -> Tensor:
    """(B, T) int64: the index of the example that each token belongs to."""
    owner = torch.zeros(size, dtype=torch.int64)
    for row_index, row in enumerate(rows):
        start = 0
        for index in row:
            end = start + int(split.lengths[index])
            owner[row_index, start:end] = index
            start = end
    return owner


def _token_nats(hidden: Tensor, targets: Tensor, phi: FusedPhiForCausalLM) -> Tensor:
    """(N,) float32: cross-entropy of each position."""
    chunks = zip(hidden.split(_POSITIONS), targets.split(_POSITIONS), strict=True)
    losses = [torch.nn.functional.cross_entropy(phi.lm_head(h).float(), t, reduction="none") for h, t in chunks]
    return torch.cat(losses) if losses else hidden.new_zeros(0, dtype=torch.float32)
