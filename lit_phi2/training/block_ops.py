"""Block operations: whether those of a run are compiled, measured on its first micro-batch.

    two blocks, forward and backward, with torch's own operations and with compiled ones (model/fusion.py)
      -> the faster, for the whole run; the checkpoint says which, because the others round differently

On CUDA only, and only where the run is long enough to earn back the seconds of compiling.
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from lightning.pytorch.strategies import Strategy

from lit_phi2.model.fusion import EAGER, BlockOps, compile_ops
from lit_phi2.model.phi2 import FusedPhiForCausalLM, packed_forward
from lit_phi2.types import Batch

log = logging.getLogger(__name__)

DEVICE_TYPES = ("cuda",)
MIN_RUN_SECONDS = 300  # of the blocks of a run; a shorter one is over before compiling has paid
NUM_BLOCKS = 2  # that are timed: the input of the first has no gradient
WARM_UPS, REPETITIONS = 2, 5


def use_block_ops(
    model: FusedPhiForCausalLM,
    batch: Batch,
    strategy: Strategy,
    *,
    num_passes: int,
    saved: bool | None,
    activation_checkpointing: bool,
) -> bool:
    """Set the operations of a run, on every rank those that rank 0 chooses; returns whether they are compiled.

    Args:
        model: whose operations are set.
        batch: on the device.
        strategy: of the Trainer.
        num_passes, saved: see choose_compiled.
        activation_checkpointing: as in the run.
    """
    if saved and model.block_ops is not EAGER:
        return True  # an earlier run of this program has tried them
    compiled = False
    if batch.input_ids.device.type in DEVICE_TYPES:
        if strategy.is_global_zero:
            seconds = partial(block_seconds, model, batch, activation_checkpointing=activation_checkpointing)
            compiled, reason = choose_compiled(seconds, num_passes=num_passes, saved=saved)
            log.info("operations of a block: %s", reason)
        compiled = strategy.broadcast(compiled)
    model.block_ops = compile_ops() if compiled else EAGER
    return compiled


def choose_compiled(
    seconds: Callable[[BlockOps], float], *, num_passes: int, saved: bool | None = None
) -> tuple[bool, str]:
    """Whether operations are compiled, and why.

    Args:
        seconds: of a block with some operations.
        num_passes: through a block, in the rest of the run.
        saved: whether those of the run are compiled so far; None for a new run.
    """
    if saved is False:
        return False, "torch's own, as before"
    eager = seconds(EAGER)
    if saved is None and num_passes * eager < MIN_RUN_SECONDS:
        return False, f"torch's own; {num_passes * eager:.0f} s in blocks are too few to compile for"
    try:
        compiled = seconds(compile_ops())
    except Exception as error:  # whatever a compiler or the lack of one raises
        text = f"torch's own, because torch.compile fails here: {type(error).__name__}: {str(error).strip()[:200]!r}"
        return False, text + (". The run continues, but not bit for bit" if saved else "")
    times = f"{1000 * compiled:.2f} ms a block compiled, {1000 * eager:.2f} ms with torch's own"
    if saved:
        return True, f"compiled, as before; {times}"
    return (True, f"compiled; {times}") if compiled < eager else (False, f"torch's own; {times}")


def block_seconds(
    model: FusedPhiForCausalLM, batch: Batch, ops: BlockOps, *, activation_checkpointing: bool = False
) -> float:
    """Seconds of a block, forward and backward, over a batch; the median of some passes after those that compile."""
    assert batch.layout is not None
    before, model.block_ops = model.block_ops, ops
    blocks = model.model.layers[:NUM_BLOCKS]
    trained = [parameter for parameter in blocks.parameters() if parameter.requires_grad]
    times = []
    try:
        for _ in range(WARM_UPS + REPETITIONS):
            began = _now(batch)
            hidden = packed_forward(
                model,
                batch.input_ids,
                batch.position_ids,
                segments=batch.layout.segments,
                activation_checkpointing=activation_checkpointing,
                num_blocks=NUM_BLOCKS,
            )
            torch.autograd.grad(hidden, trained, torch.ones_like(hidden))
            times.append((_now(batch) - began) / len(blocks))
    finally:
        model.block_ops = before
    return median(times[WARM_UPS:])


def _now(batch: Batch) -> float:
    """Seconds on the host when the device has finished."""
    if batch.input_ids.is_cuda:
        torch.cuda.synchronize(batch.input_ids.device)
    return time.perf_counter()
