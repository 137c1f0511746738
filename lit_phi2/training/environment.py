"""Environment: what else decides the last bits of a run, beside its settings and its data.

    checkpoint["lit_phi2"]["environment"]    {"torch": "2.13.0", "device": "CPU, AVX512", "num_threads": 2}

A matmul adds its products in an order that depends on torch, the device and the number of threads, so a run that is
resumed elsewhere ends in weights that differ in their last bits. That is no error, but it is logged.
"""

from collections.abc import Mapping
from typing import Any

import torch


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Version of torch, kind of device and number of threads, as plain values for a checkpoint."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        name = f"CPU, {torch.backends.cpu.get_cpu_capability()}"
    else:
        name = device.type.upper()
    return {"torch": str(torch.__version__), "device": name, "num_threads": torch.get_num_threads()}


def environment_warning(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str | None:
    """One line if a resumed run may end in other bits than the undisturbed one.

    >>> environment_warning({"num_threads": 2}, {"num_threads": 1})
    'num_threads 2 in the checkpoint, 1 now: the run continues, but not bit for bit; OMP_NUM_THREADS=2 would'
    """
    changed = [name for name, value in current.items() if saved.get(name) != value]
    if not changed:
        return None
    values = "; ".join(f"{name} {saved.get(name)} in the checkpoint, {current[name]} now" for name in changed)
    cure = f"; OMP_NUM_THREADS={saved['num_threads']} would" if changed == ["num_threads"] else ""
    return f"{values}: the run continues, but not bit for bit{cure}"
