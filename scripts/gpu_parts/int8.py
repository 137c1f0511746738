"""int8: lit_phi2 with its frozen matrices in 8 bits, beside itself in 16 bits, in alternating rounds."""

from collections.abc import Iterator
from typing import Any

from gpu_parts.contenders import Arena, Contender
from gpu_parts.machine import compute_dtype, has_int8
from gpu_parts.settings import Settings
from gpu_parts.training import measure_lengths
from peers.registry import PEERS

LOSS_TOLERANCE = 0.05  # of the loss before training


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """Measure both, or say that this version has no 8 bits.

    Raises:
        SystemExit: their losses before training differ too much.
    """
    if not has_int8():
        yield {"not_there": "model.quantization is not a key of this version"}
        return
    dtype = compute_dtype(settings)
    contenders = {
        dtype: Contender(PEERS["ours"], dtype),
        "int8": Contender(PEERS["ours"], dtype, options={"quantization": "int8"}),
    }
    yield from measure_lengths(Arena(settings, contenders), LOSS_TOLERANCE)
