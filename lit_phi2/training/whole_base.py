"""Whole base: val/loss of an adapter that was trained on a base in 8 bits, on the base as it is.

    fit with model.quantization  ->  best adapter  ->  the base in the compute dtype  ->  val/loss beside the run's

The adapter is used with either, so both losses are said.
"""

import logging
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lit_phi2.adapters.checkpoint import read_adapter
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.generation.weights import available_memory
from lit_phi2.model.loss import causal_lm_loss
from lit_phi2.model.phi2 import packed_forward
from lit_phi2.training.base import load_base
from lit_phi2.training.metrics import EvalSums, eval_metrics
from lit_phi2.training.module import LitPhi2

log = logging.getLogger(__name__)

HEADROOM = 2**30  # bytes beside the weights: a micro-batch and its logits


def log_whole_base_loss(
    trainer: pl.Trainer, model: LitPhi2, data: ClaimsDataModule, adapter: Path, quantized_loss: float
) -> None:
    """Log val/loss on the base without quantization beside that of the run, or why it was not measured.

    Args:
        trainer: of the fit that ended.
        model: that it trained, with the base in 8 bits.
        data: has the validation records.
        adapter: folder of the best adapter.
        quantized_loss: its val/loss in the run.
    """
    dtype, device = model.choose_dtype()[0], model.target_device()
    num_bytes = model.checked.num_parameters * dtype.itemsize + HEADROOM
    if trainer.world_size > 1 or num_bytes > available_memory(device):
        why = "several processes train" if trainer.world_size > 1 else f"it needs {num_bytes / 1e9:.1f} GB more"
        log.info("val/loss on the base without quantization: not measured, because %s", why)
        return
    checked = replace(model.checked, adapter=read_adapter(adapter), adapter_source=str(adapter))
    phi = load_base(checked, model.lora_settings, dtype, dropout=0.0).to(device).eval()
    base: Any = phi.get_base_model()
    sums = EvalSums().to(device)
    with torch.no_grad():
        for batch in islice(data.val_dataloader(), int(max(trainer.num_val_batches))):
            on_device = batch.to(device)
            hidden = packed_forward(base, on_device.input_ids, on_device.position_ids)
            sums.add(causal_lm_loss(hidden, on_device.labels, base.lm_head))
    loss = eval_metrics("val", sums.close())["val/loss"].item()
    log.info("val/loss of the adapter: %.4f on the base in 8 bits, %.4f on the base as it is", quantized_loss, loss)
