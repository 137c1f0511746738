"""Memory: what the memory plan says a training step of full rows allocates, to compare with what it allocated.

rows, length, dtype -> Workload -> plan_fit -> bytes of weights and tensors, without the program
"""

from dataclasses import fields
from typing import Any

import torch

from lit_phi2.model.device import card_memory
from lit_phi2.model.loss import logits_limit
from lit_phi2.training.memory_plan import plan_fit
from lit_phi2.training.memory_terms import PhiSizes, Workload
from peers.task import LORA_R

TARGETS = ("Wqkv", "fc1", "fc2")


def planned_bytes(phi: PhiSizes, dtype: str, device: str, rows: int, length: int, **settings: Any) -> int:
    """Bytes that torch allocates at most in a step over rows of `length` tokens, the second half of each supervised.

    Args:
        phi: sizes of the base.
        dtype: as model.dtype.
        device: cuda, mps or cpu.
        rows: of a micro-batch.
        length: of a row.
        settings: of the module, such as quantization, where the plan knows it.
    """
    values: dict[str, Any] = {
        "dtype": getattr(torch, dtype),
        "device_type": device,
        "lora_r": LORA_R,
        "targets": TARGETS,
        "lora_dropout": 0.0,
        "activation_checkpointing": False,
        "rows": rows,
        "row_length": length,
        "supervised": length // 2,
        "longest_example": length,
        "prompt_length": length // 2,
        "max_new_tokens": 1,
        "slots": 1,
        "logits_limit": logits_limit(device, card_memory(torch.device(device))),
    }
    if "quantized" in {field.name for field in fields(Workload)}:
        values["quantized"] = settings.get("quantization") is not None
    work = Workload(**values)
    plan = plan_fit(phi, work, program=0, memory=2**62)
    return sum(size for name, size in plan.terms.items() if name != "program")
