"""Auditing: the loss of every record under base and adapter, and the findings of the record audit.

    split -> packed rows -> hidden states -> nats of each supervised token -> (n,) nats per token of each record

The passes are those of validation, without a gradient; only the sum is kept apart for each example of a row.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lit_phi2.audit.duplicates import check_installed
from lit_phi2.audit.records import Array, AuditedRecords, audit_records, format_findings, to_row
from lit_phi2.data.canaries import is_planted
from lit_phi2.data.collate import collate
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.data.packing import Lengths
from lit_phi2.data.schedule import BatchingConfig, evaluation_schedule
from lit_phi2.data.splits import Split
from lit_phi2.errors import InputError, NonFiniteError
from lit_phi2.model.phi2 import FusedPhiForCausalLM, packed_forward
from lit_phi2.training.module import LitPhi2
from lit_phi2.types import Example, Row
from lit_phi2.utils.console import print_text
from lit_phi2.utils.files import atomic_write

log = logging.getLogger(__name__)

RECORDS_FILE = "audit_records.jsonl"
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


def measure(model: LitPhi2, data: ClaimsDataModule) -> AuditedRecords:
    """The records of train and val, without canaries, with their losses under base and adapter."""
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
    kept = [index for index, record in enumerate(records) if not is_planted(record)]
    names = [split_names[index] for index in kept]
    return AuditedRecords([records[index] for index in kept], names, base[kept], adapter[kept])


def record_losses(phi: FusedPhiForCausalLM, split: Split, batching: BatchingConfig) -> Array:
    """(n,) nats per supervised token of each example; the arguments are as those of `example_nats`."""
    return example_nats(phi, split.examples, split.lengths, batching) / np.maximum(split.supervised, 1)


@torch.inference_mode()
def example_nats(
    phi: FusedPhiForCausalLM, examples: Sequence[Example], lengths: Lengths, batching: BatchingConfig
) -> Array:
    """(n,) summed nats of the supervised tokens of each example, in packed rows, in eval mode.

    Args:
        phi: with the adapter, or with it disabled.
        examples: to measure.
        lengths: (n,) tokens of each.
        batching: of data.max_length, packing and batch_size.

    Raises:
        NonFiniteError: the loss of an example is not finite; names the first.
    """
    was_training = phi.training
    phi.eval()
    nats = np.zeros(len(examples))
    device = next(phi.parameters()).device
    for micro in evaluation_schedule(lengths, batching):
        batch = collate(examples, micro.rows).to(device)
        assert batch.layout is not None
        scored = batch.layout.scored
        hidden = packed_forward(phi, batch.input_ids, batch.position_ids, segments=batch.layout.segments)
        owner = _owners(lengths, micro.rows, batch.input_ids.shape).flatten()
        values = _token_nats(hidden.flatten(0, 1)[scored.positions], scored.targets.clamp(min=0), phi)
        owners = owner[scored.positions.cpu() + 1][: scored.count].numpy()
        np.add.at(nats, owners, values.cpu().double().numpy()[: scored.count])  # a Mac's GPU has no float64
    phi.train(was_training)
    if not np.isfinite(nats).all():
        location = examples[int(np.flatnonzero(~np.isfinite(nats))[0])].location
        raise NonFiniteError(f"{location}: its loss is infinite or not a number; in float16, try another model.dtype.")
    return nats


def _owners(lengths: Lengths, rows: tuple[Row, ...], size: torch.Size) -> Tensor:
    """(B, T) int64: the index of the example that each token belongs to."""
    owner = torch.zeros(size, dtype=torch.int64)
    for row_index, row in enumerate(rows):
        start = 0
        for index in row:
            end = start + int(lengths[index])
            owner[row_index, start:end] = index
            start = end
    return owner


def _token_nats(hidden: Tensor, targets: Tensor, phi: FusedPhiForCausalLM) -> Tensor:
    """(N,) float32: cross-entropy of each position."""
    chunks = zip(hidden.split(_POSITIONS), targets.split(_POSITIONS), strict=True)
    losses = [torch.nn.functional.cross_entropy(phi.lm_head(h).float(), t, reduction="none") for h, t in chunks]
    return torch.cat(losses) if losses else hidden.new_zeros(0, dtype=torch.float32)
