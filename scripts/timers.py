"""Timers: peak memory, waiting for a device, and the rate at which a device multiplies matrices.

    reset_peak_memory -> work -> peak_gib                GiB, since the reset
    began = now(device) -> work -> now(device) - began   seconds, after the device has finished
    weight (out, in), rows -> matmul_rates               FLOP/s of x W^T and of g W

Only the standard library is imported at the top: the process that starts the benchmarks must stay small, because Linux
counts the memory of the parent process into the peak of its child.
"""

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROC = Path("/proc/self")


def now(device: str) -> float:
    """Seconds of a monotonic clock, read after the device has finished what was queued."""
    synchronize(device)
    return time.perf_counter()


def synchronize(device: str) -> None:
    """Wait until a GPU has finished; a CPU queues nothing."""
    if device == "cpu":
        return
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device.startswith("mps"):
        torch.mps.synchronize()


def peak_gib(device: str = "cpu") -> float:
    """The most GiB allocated on the GPU, or resident in this process, since reset_peak_memory.

    MPS has no peak: the value is what its driver holds now. On a system without /proc it is the peak of the process
    since its start.
    """
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.startswith("mps"):
        import torch

        return torch.mps.driver_allocated_memory() / 2**30
    if PROC.exists():
        return _proc_status_gib("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # bytes on macOS


def reset_peak_memory(device: str = "cpu") -> None:
    """Start a new peak, where the system can."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    elif device == "cpu" and PROC.exists():
        (PROC / "clear_refs").write_text("5")


def resident_gib() -> float:
    """GiB of this process that are resident now; Linux only."""
    return _proc_status_gib("VmRSS")


def anonymous_gib() -> float:
    """GiB that this process holds itself, without the pages of mapped files; Linux only."""
    return _proc_status_gib("RssAnon")


def matmul_rates(name: str, rows: int, weight: Any, *, seconds: float = 0.5) -> dict[str, float]:
    """FLOP/s of x W^T and of g W, the forward and backward matmul of a frozen layer.

    They are measured in the dtype that this device multiplies fastest for such a weight: float32 where a CPU has no
    instructions for bfloat16, int8 with int32 sums where the weight is int8.

    Args:
        name: of the layer, for the keys.
        rows: of x and g.
        weight: (out, in); its shape, dtype and device are used, not its values.
        seconds: duration of each measurement, long enough for a sustained rate.
    """
    import torch
    from torch.nn import functional as F  # noqa: N812  the name in torch's own documentation

    from lit_phi2.model.linear import matmul_dtype

    num_out, num_in = weight.shape
    is_int8 = weight.dtype == torch.int8
    dtype = torch.int8 if is_int8 else matmul_dtype(weight)
    w, x, g = (
        (10 * torch.randn(shape, device=weight.device)).to(dtype)
        for shape in ((num_out, num_in), (rows, num_in), (rows, num_out))
    )
    matmuls: dict[str, Callable[[], Any]] = {
        f"{name} forward, {rows} x {num_in} x {num_out}": lambda: (
            torch._int_mm(x, w.t()) if is_int8 else F.linear(x, w)
        ),
        f"{name} backward, {rows} x {num_out} x {num_in}": lambda: torch._int_mm(g, w) if is_int8 else g @ w,
    }
    flops = 2 * rows * num_in * num_out
    with torch.no_grad():
        return {key: flops * _calls_per_second(matmul, weight.device.type, seconds) for key, matmul in matmuls.items()}


def _calls_per_second(call: Callable[[], Any], device: str, seconds: float) -> float:
    calls_per_sync = 1 if device == "cpu" else 50
    call()
    count, elapsed, began = 0, 0.0, now(device)
    while elapsed < seconds:
        for _ in range(calls_per_sync):
            call()
        count += calls_per_sync
        elapsed = now(device) - began
    return count / elapsed


def _proc_status_gib(field: str) -> float:
    lines = (PROC / "status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) / 2**20
