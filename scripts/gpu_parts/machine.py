"""Machine: the card and the versions that everything else ran on."""

import inspect
import os
import platform
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch

from gpu_parts.settings import Settings
from lit_phi2.errors import InputError
from lit_phi2.model.device import check_dtype, choose_dtype
from lit_phi2.training.module import LitPhi2
from measurement import cpu_name

PHI2_PARAMETERS = 2_779_683_840  # whatever settings.layers is: it decides the dtype on a CPU alone


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    device = torch.device(settings.device)
    facts: dict[str, Any] = {
        "device": device_name(device),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": {name: version(name) for name in ("lightning", "transformers", "peft", "datasets")},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["memory_gib"] = round(properties.total_memory / 2**30, 1)
        facts["capability"] = f"sm{properties.major}{properties.minor}"
    torch.ones(1, device=device).add_(1)  # fails here if the driver does not fit
    facts["dtype"] = f"{compute_dtype(settings)}: {choose_dtype(settings.dtype, device, PHI2_PARAMETERS)[1]}"
    yield facts | {"summary": f"{facts['device']}, torch {facts['torch']}, CUDA {facts['cuda']}"}


def compute_dtype(settings: Settings) -> str:
    """The dtype that the settings choose on their device, as model.dtype takes it."""
    return str(choose_dtype(settings.dtype, torch.device(settings.device), PHI2_PARAMETERS)[0]).removeprefix("torch.")


def has_float16() -> bool:
    """Whether this version of lit_phi2 accepts model.dtype float16."""
    try:
        check_dtype("float16")
    except InputError:
        return False
    return True


def has_int8() -> bool:
    """Whether this version of lit_phi2 has the key model.quantization."""
    return "quantization" in inspect.signature(LitPhi2.__init__).parameters


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name()
