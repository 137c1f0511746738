"""Devices: the compute dtype that suits a device, and why.

Lightning picks the device (`trainer.accelerator: auto`: CUDA, then MPS, then CPU). The dtype follows it: bfloat16 on a
GPU that multiplies it fast and on every CPU (`model/products.py` has the products for those that cannot), float32
elsewhere. float16 is refused for Phi-2.
"""

import ctypes
import sys

import torch

from lit_phi2.errors import InputError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGE = 32 * 2**20  # bytes; the most to which glibc's own threshold grows


def choose_dtype(requested: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The compute dtype for a device, and the reason in a few words.

    Args:
        requested: model.dtype: auto, bfloat16 or float32.
        device: where the model will run.

    Raises:
        InputError: a dtype that Phi-2 or the device cannot do.

    >>> choose_dtype("float32", torch.device("cpu"))
    (torch.float32, 'as model.dtype asks')
    """
    check_dtype(requested)
    fast, reason = has_native_bf16(device)
    if requested == "auto":
        return (torch.bfloat16 if fast or device.type == "cpu" else torch.float32), reason
    if requested == "bfloat16" and not fast and device.type == "mps":
        raise InputError(f"model.dtype: bfloat16 cannot be used here: {reason}. Use float32 or auto.")
    return getattr(torch, requested), "as model.dtype asks"


def disable_malloc_trim() -> bool:
    """Let the process keep the memory that a step frees, since the next one takes as much again.

    glibc gives the top of its heap back to the system after every step, and a page that is taken anew is cleared first:
    some tens of thousands of pages a step of Phi-2's width. Only blocks above 32 MiB, the keys and values of long
    answers among them, still come and go.

    Returns:
        Whether that was set; other systems than Linux with glibc have no such setting, and are left alone.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return False
    # Setting either freezes the other where it stands, so both are.
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, _LARGE) and libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def check_dtype(requested: str) -> None:
    """Refuse what no device could make right, before anything is loaded.

    Raises:
        InputError: float16, or an unknown dtype.
    """
    if requested in ("float16", "fp16", "half"):
        # huggingface/transformers#28673
        raise InputError(
            "model.dtype: float16 is refused: Phi-2's attention overflows its range and answers turn into '!!!!'. "
            "Use bfloat16, float32 or auto."
        )
    if requested not in ("auto", "bfloat16", "float32"):
        raise InputError(f"model.dtype: {requested!r} is unknown; expected auto, bfloat16 or float32.")


def has_native_bf16(device: torch.device) -> tuple[bool, str]:
    """Whether a device has instructions for products in bfloat16, and what tells."""
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
    # Private names, because torch offers no public question for these; both exist in the pinned version.
    if torch.cpu._is_amx_tile_supported():
        return True, "this CPU has AMX"
    if torch.cpu._is_avx512_bf16_supported():
        return True, "this CPU has AVX512-BF16"
    return False, "this CPU has neither AMX nor AVX512-BF16, so bfloat16 weights are multiplied in float32"
