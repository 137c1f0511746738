"""Device: the compute dtype that suits a device and a model, and the reason.

    auto on CUDA     bfloat16 from sm80 on, float16 from sm70 to sm75 (Volta, Turing), else float32
    auto on MPS      bfloat16 where the GPU has it, else float32
    auto on a CPU    bfloat16 where the CPU multiplies it faster than float32; elsewhere float32 if the weights then
                     take less than a quarter of the memory, else bfloat16, which `linear.py` multiplies in float32

Lightning chooses the device (`trainer.accelerator: auto`: CUDA, then MPS, then CPU). float16 ends at 65,504: what can
overflow, and what is done about it, is in `training/README.md`.
"""

import ctypes
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import Tensor

from lit_phi2.errors import InputError

DTYPES = ("auto", "bfloat16", "float16", "float32")
FLOAT16_CAPABILITY, FLASH_CAPABILITY = (7, 0), (8, 0)  # the first cards with tensor cores; the first with bfloat16
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_MMAP_THRESHOLD_BYTES = 32 * 2**20  # the largest value to which glibc raises its own threshold
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # what a container may use; "max" without a limit


def choose_dtype(requested: str, device: torch.device, num_parameters: int) -> tuple[torch.dtype, str]:
    """The compute dtype for a device, and the reason in a few words.

    Args:
        requested: model.dtype: auto, bfloat16, float16 or float32.
        device: where the model runs.
        num_parameters: of the model.

    Raises:
        InputError: the dtype is unknown, or the device does not support it.

    >>> choose_dtype("float32", torch.device("cpu"), 2_779_683_840)
    (torch.float32, 'set by model.dtype')
    """
    check_dtype(requested)
    is_fast, reason = has_fast_bf16(device)
    if requested == "auto":
        if is_fast:
            return torch.bfloat16, reason
        if device.type == "cuda" and torch.cuda.get_device_capability(device) >= FLOAT16_CAPABILITY:
            return torch.float16, f"{reason}, but float16"
        if device.type != "cpu":
            return torch.float32, reason
        fits = 4 * num_parameters < total_memory() / 4
        size = f"{4 * num_parameters / 1e6:,.0f} MB of float32 weights"
        comparison = f"{'less' if fits else 'more'} than a quarter of the memory"
        return (torch.float32 if fits else torch.bfloat16), f"{reason}; {size} are {comparison}"
    if requested == "bfloat16" and not is_fast and device.type == "mps":
        raise InputError(f"model.dtype: bfloat16 cannot be used here: {reason}. Use float32 or auto.")
    return getattr(torch, requested), "set by model.dtype"


def check_dtype(requested: str) -> None:
    """Refuse an unknown dtype before anything is loaded.

    Raises:
        InputError: names the dtypes.
    """
    if requested not in DTYPES:
        raise InputError(f"model.dtype: {requested!r} is unknown; expected {', '.join(DTYPES[:-1])} or {DTYPES[-1]}.")


def has_flash_attention(device: torch.device) -> bool:
    """Whether a CUDA card has torch's kernel for examples of different lengths, which needs Ampere's instructions."""
    return torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY


def keep_float32_sums() -> None:
    """Forbid cuBLAS to add parts of a float16 product in float16, where they overflow before the sum does.

    torch allows it by default. On other devices nothing reads the setting.
    """
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def has_fast_bf16(device: torch.device) -> tuple[bool, str]:
    """Whether a device multiplies bfloat16 faster than float32, and the evidence for a log line."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        verb = "multiplies" if major >= 8 else "does not multiply"
        return major >= 8, f"{torch.cuda.get_device_name(device)}, sm{major}{minor}, {verb} bfloat16 fast"
    if device.type == "mps":
        try:
            torch.ones(1, dtype=torch.bfloat16, device=device).add_(1)
        except (RuntimeError, TypeError):
            return False, "this Apple GPU or macOS has no bfloat16"
        return True, "this Apple GPU has bfloat16"
    instructions = cpu_bf16_instructions()
    if instructions is None:
        return False, "this CPU has neither AMX nor AVX512-BF16"
    if instructions == "AMX":
        return True, "this CPU has AMX"
    speedup = bf16_speedup()
    return speedup > 1, f"this CPU's AVX512-BF16 multiplies bfloat16 {speedup:.1f} times as fast as float32"


def cpu_bf16_instructions() -> str | None:
    """The CPU's instructions for bfloat16 matmuls: AMX or AVX512-BF16; None without any."""
    # Private names, because torch has no public function for these; both exist in the pinned version.
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return "AVX512-BF16" if torch.cpu._is_avx512_bf16_supported() else None


@functools.cache
def bf16_speedup() -> float:
    """How many times as fast as float32 the CPU multiplies bfloat16, measured in 50 ms.

    AVX512-BF16 alone does not tell: on some CPUs it is twice as fast as float32, on others half as fast. The best of
    many short products on one thread is taken, so that other jobs and other ranks on the machine do not change the
    answer.
    """
    x, weight = torch.ones(128, 512), torch.ones(512, 512)
    bf16_x, bf16_weight = x.bfloat16(), weight.bfloat16()
    return fastest_seconds(lambda: x @ weight.t()) / fastest_seconds(lambda: bf16_x @ bf16_weight.t())


def fastest_seconds(product: Callable[[], Tensor]) -> float:
    """Seconds of the fastest of 30 calls on one thread; other jobs interrupt few that take less than a millisecond."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return min(_seconds(product) for _ in range(30))
    finally:
        torch.set_num_threads(num_threads)


def _seconds(product: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    product()
    return time.perf_counter() - start


def card_memory(device: torch.device) -> int:
    """Bytes of a CUDA card, whatever is free; 0 of other devices."""
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else 0


def total_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its container's limit."""
    limit = CGROUP_LIMIT.read_text() if CGROUP_LIMIT.is_file() else "max"
    memory: int = psutil.virtual_memory().total
    return min(memory, int(limit)) if limit.strip().isdigit() else memory


def disable_malloc_trim() -> bool:
    """Keep the memory that a step frees in the process, because the next step takes as much again.

    glibc returns the top of its heap to the system after every step, and a page taken from the system is cleared first:
    some tens of thousands of pages per step at Phi-2's width. Only blocks above 32 MiB, such as the keys and values of
    long completions, are still returned.

    Returns:
        Whether it was set; only Linux with glibc has this setting.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return False
    # Setting one of them freezes the other at its present value, so both are set.
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES) and libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def trim_malloc() -> None:
    """Return the free memory of the heap to the system, its holes too: what a step leaves between tensors that stay.

    glibc gives an aligned tensor the end of a larger block, so a hole is too small for the next tensor of its size, and
    a fit of Phi-2 in 8 bits would take a tenth more memory.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
