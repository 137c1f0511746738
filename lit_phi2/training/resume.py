"""Resume: which settings a resumed run must share, and where Lightning's counters must be on another number of ranks.

    checkpoint["lit_phi2"]["run"]      the fingerprint of the run that wrote it: {config key: value}
    run_fingerprint(...) now           the same keys; any other value is an error that names both

A run may be resumed on another number of processes if `data.batch_size x accumulate_grad_batches x processes` is
unchanged: the optimizer steps are then the same. But Lightning counts micro-batches of one process, so these counters
must be recomputed from the number of optimizer steps, or the run would continue at the wrong batch. So must those of a
checkpoint that was written inside an accumulation window, whose gradients are not in it.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch

from lit_phi2.adapters.adapter import Adapter
from lit_phi2.data.schedule import BatchingConfig
from lit_phi2.errors import InputError
from lit_phi2.utils.files import tree_digest


def run_fingerprint(
    model: Mapping[str, Any],
    *,
    compute_dtype: torch.dtype,
    trainer: pl.Trainer,
    total_steps: int,
    data: Mapping[str, Any],
) -> dict[str, Any]:
    """Every setting that decides a run, by config key.

    Args:
        model: arguments of the module; the base as its digest, wherever it is stored now.
        compute_dtype: the dtype in use, not `auto`.
        trainer: whose clipping and limits decide the run too.
        total_steps: optimizer steps of the whole run.
        data: fingerprint of the data module.
    """
    return {
        **{f"model.{name}": value for name, value in model.items()},
        "compute_dtype": str(compute_dtype).removeprefix("torch."),
        "trainer.gradient_clip_val": trainer.gradient_clip_val,
        "trainer.gradient_clip_algorithm": getattr(trainer.gradient_clip_algorithm, "value", "norm"),
        "trainer.overfit_batches": trainer.overfit_batches,
        "val_batches_all_ranks": batches_of_all_ranks(trainer.limit_val_batches, trainer.world_size),
        "total_steps": total_steps,
        **data,
    }


def batches_of_all_ranks(limit: int | float, world_size: int) -> int | float:
    """Lightning's limit on the batches of each rank, as a number that is the same on any number of ranks."""
    return limit * world_size if isinstance(limit, int) else limit


def generation_fingerprint(
    *,
    base_digest: str,
    adapter: Adapter | None,
    compute_dtype: torch.dtype,
    max_new_tokens: int,
    quantization: Any,
) -> dict[str, Any]:
    """Everything that decides the completion of a prompt.

    Args:
        base_digest: of the base.
        adapter: None for the base alone.
        compute_dtype: the dtype in use, not `auto`.
        max_new_tokens: of a completion.
        quantization: how layers are multiplied in 8 bits, as plain values; None in 16 or 32 bits.
    """
    quantized = {} if quantization is None else {"quantization": tree_digest(quantization)}
    return {
        "base": base_digest,
        "adapter": "" if adapter is None else adapter_digest(adapter),
        "dtype": str(compute_dtype),
        "max_new_tokens": max_new_tokens,
        **quantized,
    }


def adapter_digest(adapter: Adapter) -> str:
    """Of what an adapter computes: its settings and weights, in whatever order they were read."""
    return tree_digest([asdict(adapter.settings), dict(sorted(adapter.weights.items()))])


def check_resumable(saved: Mapping[str, Any], current: Mapping[str, Any], batching: BatchingConfig) -> None:
    """Compare the fingerprint in a checkpoint with that of this run.

    Raises:
        InputError: they differ; names every key that differs, with both values.
    """
    # A checkpoint may be from before these settings.
    saved = {"model.use_rslora": False, "model.quantization": None, "data.canaries": 0, **saved}
    changed = [key for key in current if saved.get(key) != current[key]]
    if not changed:
        return
    lines = [_difference(key, saved.get(key), current[key]) for key in changed]
    if "rows_per_step" in changed:
        lines.append(
            f"(now data.batch_size {batching.batch_size} x trainer.accumulate_grad_batches {batching.accumulate} x "
            f"{batching.world_size} processes; use any three whose product is that of the checkpoint)"
        )
    raise InputError(
        "fit --ckpt_path continues the same run, but these settings differ:\n"
        + "\n".join(lines)
        + "\nTo train its weights further with other settings, use --model.adapter CKPT; that starts at step 0."
    )


# What a person can act on, where the key of the fingerprint alone says too little.
_MEANINGS = {
    "train_data_digest": "data.train_files: have other training records",
    "val_data_digest": "data.val_files: have other validation records, and best.ckpt is the lowest val/loss of the "
    "whole run",
    "model.base": "model.base: is another one, or its files were changed",
    "compute_dtype": "model.dtype: computes in another dtype",
    "val_batches_all_ranks": "trainer.limit_val_batches: validates on other batches",
    "train_batches_all_ranks": "trainer.limit_train_batches: trains on other batches",
}


def _difference(key: str, saved: Any, current: Any) -> str:
    """One line about a key whose values differ.

    >>> _difference("train_data_digest", "1f2e", "9a8b")
    'data.train_files: have other training records (1f2e in the checkpoint, 9a8b now)'
    """
    values = f"{saved} in the checkpoint, {current} now"
    return f"{_MEANINGS[key]} ({values})" if key in _MEANINGS else f"{key}: {values}"


def repeated_outputs(checkpoint: Mapping[str, Any]) -> tuple[str, ...]:
    """How the tags begin that a resumed run writes again at its first step, because a signal ended the run there.

    >>> loops = {"fit_loop": {"epoch_loop.state_dict": {"validation_due": True}}}
    >>> repeated_outputs({"loops": loops, "callbacks": {}})
    ('val/', 'samples/')
    """
    if checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"].get("validation_due"):
        return "val/", "samples/"
    samples = checkpoint["callbacks"].get("SampleWriter", {})
    return () if samples.get("due_step") is None else ("samples/",)


def remap_batch_progress(
    checkpoint: dict[str, Any], *, accumulate: int, steps_per_epoch: int, batches_per_epoch: int
) -> None:
    """Set Lightning's counters of micro-batches to the end of the last optimizer step, on this number of ranks.

    Args:
        checkpoint: changed in place, unless its counters are right.
        accumulate: micro-batches of one rank in an optimizer step, now.
        steps_per_epoch: optimizer steps in an epoch, the same on any number of ranks.
        batches_per_epoch: micro-batches of one rank in an epoch, now.

    >>> counters = {"current": {"ready": 8, "completed": 7}, "total": {"ready": 18, "completed": 17}}
    >>> progress = counters | {"is_last_batch": False}
    >>> loops = {"fit_loop": {"epoch_loop.batch_progress": progress}}
    >>> checkpoint = {"global_step": 9, "loops": loops, "lit_phi2": {"accumulate_grad_batches": 2}}
    >>> remap_batch_progress(checkpoint, accumulate=4, steps_per_epoch=5, batches_per_epoch=20)
    >>> progress["current"], progress["total"]
    ({'ready': 16, 'completed': 15}, {'ready': 36, 'completed': 35})
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    epoch, step = divmod(checkpoint["global_step"], steps_per_epoch)
    if not step and progress["is_last_batch"]:  # written at the end of an epoch that is not counted yet
        epoch, step = epoch - 1, steps_per_epoch
    ready = min(step * accumulate, batches_per_epoch)
    is_same = checkpoint["lit_phi2"]["accumulate_grad_batches"] == accumulate
    if is_same and progress["current"]["ready"] in (ready, 0):  # 0: the epoch is counted already
        return
    for name, earlier_epochs in (("current", 0), ("total", epoch * batches_per_epoch)):
        counters = progress[name]
        behind = {key: counters["ready"] - count if ready else 0 for key, count in counters.items()}
        counters |= {key: earlier_epochs + ready - behind[key] for key in counters}
