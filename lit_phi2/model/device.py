"""Device: the compute dtype that suits a device, and the reason.

    auto on CUDA     bfloat16 from sm80 on, else float32
    auto on MPS      bfloat16 where the GPU has it, else float32
    auto on a CPU    bfloat16 (`linear.py` multiplies it on CPUs that have no instructions for it)

Lightning chooses the device (`trainer.accelerator: auto`: CUDA, then MPS, then CPU). float16 is refused for Phi-2.
"""

import ctypes
import sys

import torch

from lit_phi2.errors import InputError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_MMAP_THRESHOLD_BYTES = 32 * 2**20  # the largest value to which glibc raises its own threshold


def choose_dtype(requested: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The compute dtype for a device, and the reason in a few words.

    Args:
        requested: model.dtype: auto, bfloat16 or float32.
        device: where the model runs.

    Raises:
        InputError: Phi-2 or the device does not support the dtype.

    >>> choose_dtype("float32", torch.device("cpu"))
    (torch.float32, 'set by model.dtype')
    """
    check_dtype(requested)
    is_native, reason = has_native_bf16(device)
    if requested == "auto":
        return (torch.bfloat16 if is_native or device.type == "cpu" else torch.float32), reason
    if requested == "bfloat16" and not is_native and device.type == "mps":
        raise InputError(f"model.dtype: bfloat16 cannot be used here: {reason}. Use float32 or auto.")
    return getattr(torch, requested), "set by model.dtype"


def check_dtype(requested: str) -> None:
    """Refuse a dtype that works on no device, before anything is loaded.

    Raises:
        InputError: float16, or an unknown dtype.
    """
    if requested in ("float16", "fp16", "half"):
        # huggingface/transformers#28673
        raise InputError(
            "model.dtype: float16 is refused: Phi-2's attention overflows its range and completions become '!!!!'. "
            "Use bfloat16, float32 or auto."
        )
    if requested not in ("auto", "bfloat16", "float32"):
        raise InputError(f"model.dtype: {requested!r} is unknown; expected auto, bfloat16 or float32.")


def has_native_bf16(device: torch.device) -> tuple[bool, str]:
    """Whether a device has instructions for bfloat16 matmuls, and the evidence for a log line."""
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
    if instructions := cpu_bf16_instructions():
        return True, f"this CPU has {instructions}"
    return False, "this CPU has neither AMX nor AVX512-BF16, so bfloat16 weights are multiplied in float32"


def cpu_bf16_instructions() -> str | None:
    """The CPU's instructions for bfloat16 matmuls: AMX or AVX512-BF16; None without any."""
    # Private names, because torch has no public function for these; both exist in the pinned version.
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return "AVX512-BF16" if torch.cpu._is_avx512_bf16_supported() else None


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
