"""Resume: which settings a resumed run must share, and where Lightning's counters must be on another number of ranks.

    checkpoint["lit_phi2"]["run"]      the fingerprint of the run that wrote it: {config key: value}
    run_fingerprint(...) now           the same keys; any other value is an error that names both

A run may be resumed on another number of processes if `data.batch_size x accumulate_grad_batches x processes` is
unchanged: the optimizer steps are then the same. But Lightning counts micro-batches of one process, so these counters
must be recomputed from the number of optimizer steps, or the run would continue at the wrong batch.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lit_phi2.data.schedule import BatchingConfig
from lit_phi2.errors import InputError
from lit_phi2.utils.files import tree_digest


def run_fingerprint(
    model: Mapping[str, Any],
    *,
    compute_dtype: torch.dtype,
    gradient_clip_val: float | None,
    total_steps: int,
    data: Mapping[str, Any],
) -> dict[str, Any]:
    """Every setting that decides a run, by config key.

    Args:
        model: arguments of the module; the base as its digest, wherever it is stored now.
        compute_dtype: the dtype in use, not `auto`.
        gradient_clip_val: of the Trainer.
        total_steps: optimizer steps of the whole run.
        data: fingerprint of the data module.
    """
    return {
        **{f"model.{name}": value for name, value in model.items()},
        "compute_dtype": str(compute_dtype),
        "trainer.gradient_clip_val": gradient_clip_val,
        "total_steps": total_steps,
        **data,
    }


def generation_fingerprint(
    *, base_digest: str, adapter: Mapping[str, Tensor] | None, compute_dtype: torch.dtype, max_new_tokens: int
) -> dict[str, Any]:
    """Everything that decides the completion of a prompt.

    Args:
        base_digest: of the base.
        adapter: weights; None for the base alone.
        compute_dtype: the dtype in use, not `auto`.
        max_new_tokens: of a completion.
    """
    return {
        "base": base_digest,
        "adapter": "" if adapter is None else tree_digest(adapter),
        "dtype": str(compute_dtype),
        "max_new_tokens": max_new_tokens,
    }


def check_resumable(saved: Mapping[str, Any], current: Mapping[str, Any], batching: BatchingConfig) -> None:
    """Compare the fingerprint in a checkpoint with that of this run.

    Raises:
        InputError: they differ; names every key that differs, with both values.
    """
    changed = [key for key in current if saved.get(key) != current[key]]
    if not changed:
        return
    lines = [f"{key}: {saved.get(key)} in the checkpoint, {current[key]} now" for key in changed]
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


def remap_batch_progress(
    checkpoint: dict[str, Any], *, accumulate: int, steps_per_epoch: int, batches_per_epoch: int
) -> None:
    """Set Lightning's counters of micro-batches to the same number of optimizer steps on this number of ranks.

    Args:
        checkpoint: changed in place, if it was written with another accumulate_grad_batches.
        accumulate: micro-batches of one rank in an optimizer step, now.
        steps_per_epoch: optimizer steps in an epoch, the same on any number of ranks.
        batches_per_epoch: micro-batches of one rank in an epoch, now.

    >>> progress = {"current": {"ready": 8, "completed": 7}, "total": {"ready": 18, "completed": 17}}
    >>> loops = {"fit_loop": {"epoch_loop.batch_progress": progress}}
    >>> checkpoint = {"global_step": 9, "loops": loops, "lit_phi2": {"accumulate_grad_batches": 2}}
    >>> remap_batch_progress(checkpoint, accumulate=4, steps_per_epoch=5, batches_per_epoch=20)
    >>> progress
    {'current': {'ready': 16, 'completed': 15}, 'total': {'ready': 36, 'completed': 35}}
    """
    if checkpoint["lit_phi2"]["accumulate_grad_batches"] == accumulate:
        return
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    epoch, step = divmod(checkpoint["global_step"], steps_per_epoch)
    if not step and progress["current"]["ready"]:  # written at the end of an epoch that is not counted yet
        epoch, step = epoch - 1, steps_per_epoch
    ready = min(step * accumulate, batches_per_epoch)
    for name, earlier_epochs in (("current", 0), ("total", epoch * batches_per_epoch)):
        counters = progress[name]
        behind = {key: counters["ready"] - count for key, count in counters.items()}
        counters |= {key: earlier_epochs + ready - behind[key] for key in counters}
