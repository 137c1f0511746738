"""Capacity: how many sequences are decoded at the same time.

prompts that wait, memory that is left, device  ->  slots
"""

import torch

from lit_phi2.generation.weights import available_memory

DEFAULT_SLOTS = {"cpu": 64, "cuda": 64, "mps": 32}  # products of so many rows come near a machine's rate
CACHE_SHARE = 0.5  # of the memory that is left


def choose_num_slots(
    max_slots: int | None, num_prompts: int | None, device: torch.device, slot_bytes: int | None = None
) -> int:
    """Sequences at the same time, at least one.

    Args:
        max_slots: model.max_slots; None for the device's default.
        num_prompts: that will be submitted; None for many.
        device: where the model runs.
        slot_bytes: keys and values of one sequence; None to leave the memory out.
    """
    num_slots = max_slots or DEFAULT_SLOTS.get(device.type, 32)
    if num_prompts is not None:
        num_slots = min(num_slots, num_prompts)
    if slot_bytes is not None:
        num_slots = min(num_slots, int(CACHE_SHARE * available_memory(device)) // slot_bytes)
    return max(1, num_slots)
