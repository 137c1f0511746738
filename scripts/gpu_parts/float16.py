"""float16: lit_phi2 in float16, beside itself in the dtype that `auto` chooses, in alternating rounds."""

from collections.abc import Iterator
from typing import Any

from gpu_parts.contenders import Arena, Contender
from gpu_parts.machine import compute_dtype, has_float16
from gpu_parts.settings import Settings
from gpu_parts.training import measure_lengths
from peers.registry import PEERS

LOSS_TOLERANCE = 0.02  # of the loss before training


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """Measure both, or say that this version refuses float16.

    Raises:
        SystemExit: their losses before training differ too much.
    """
    dtype = compute_dtype(settings)
    if not has_float16():
        yield {"not_there": "model.dtype float16 is refused by this version"}
        return
    if dtype == "float16":
        yield {"not_there": "it is what auto chooses here: the part training has it"}
        return
    contenders = {dtype: Contender(PEERS["ours"], dtype), "float16": Contender(PEERS["ours"], "float16")}
    yield from measure_lengths(Arena(settings, contenders), LOSS_TOLERANCE)
