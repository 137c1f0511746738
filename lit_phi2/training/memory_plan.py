"""Memory plan: what fit and predict need, whether a device has it, and which key to change if not.

    sizes of the base, settings, longest row  ->  terms (memory_terms.py)  ->  Plan
    Plan, memory of a device                  ->  fits, or the keys with which it would

On a CPU the peak is that of the resident memory, as `train/memory_gib` logs it: weights are copied from their files
into memory that the process holds itself, and the code of torch and other libraries counts too. On a GPU it is what
torch allocates, and the context with its libraries.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from lit_phi2.generation.capacity import CACHE_SHARE
from lit_phi2.generation.weights import MIN_PASSES
from lit_phi2.training.callbacks.samples import NUM_SAMPLES
from lit_phi2.training.memory_terms import (
    FLOAT32_BYTES,
    PhiSizes,
    Workload,
    activation_bytes,
    cache_bytes,
    copy_bytes,
    logits_bytes,
    num_lora_parameters,
    prefill_bytes,
    slot_bytes,
    weight_bytes,
    workspace_bytes,
)

# Beside weights and tensors. What a context and its libraries take on a device:
CONTEXT_BYTES = {"cuda": 600 * 10**6, "mps": 300 * 10**6}
# and what fit loads in the process after the data is read, measured by scripts/memory_plan_check.py: TensorBoard,
# autograd, kernels that are compiled for their shapes. predict holds fewer records instead, so nothing is added.
TRAINING_BYTES = {"cpu": 170 * 10**6}
SHORTEST_ROW = 128  # tokens; data.max_length is not lowered below it


@dataclass(frozen=True, slots=True)
class Plan:
    """What a subcommand needs.

    Attributes:
        terms: bytes of what is always needed, by name.
        peak: bytes where decoding also has its copy of the weights, if that is more than the sum of the terms.
        slots: completions at the same time.
    """

    terms: dict[str, int]
    peak: int
    slots: int

    @property
    def needed(self) -> int:
        """The sum of the terms."""
        return sum(self.terms.values())


def plan_fit(phi: PhiSizes, work: Workload, program: int, memory: int) -> Plan:
    """The terms of a training step, and the peak, which the samples of the validations may have.

    Args:
        phi: sizes of the base.
        work: as configured.
        program: bytes of everything that is neither weights nor tensors.
        memory: of the device.
    """
    trained = num_lora_parameters(phi, work.lora_r, work.targets)
    held = {
        "weights": weight_bytes(phi, work),
        "LoRA, its gradients": 2 * FLOAT32_BYTES * trained,
        "optimizer": 2 * FLOAT32_BYTES * trained,  # AdamW's two moments
    }
    step = {
        "activations": activation_bytes(phi, work),
        "work space": workspace_bytes(phi, work),
        "logits": logits_bytes(phi, work),
    }
    program += TRAINING_BYTES.get(work.device_type, 0)
    base = program + sum(held.values())
    samples = replace(work, slots=min(work.slots, NUM_SAMPLES))
    decoding = _decoding_terms(phi, samples, work.max_new_tokens, memory - base)
    peak = base + max(sum(step.values()), sum(decoding.values()))
    return Plan({**held, **step, "program": program}, peak, samples.slots)


def plan_predict(phi: PhiSizes, work: Workload, program: int, memory: int) -> Plan:
    """The terms of decoding many prompts; the slots are as many as the memory lets the engine have.

    Args:
        phi, work, program, memory: see plan_fit.
    """
    held = {
        "weights": weight_bytes(phi, work),
        "LoRA, its gradients": FLOAT32_BYTES * num_lora_parameters(phi, work.lora_r, work.targets),
    }
    base = program + sum(held.values())
    copy = copy_bytes(phi, work, MIN_PASSES, memory - base)
    affordable = int(CACHE_SHARE * max(0, memory - base - copy)) // slot_bytes(phi, work)
    work = replace(work, slots=max(1, min(work.slots, affordable)))
    decoding = {"work space": prefill_bytes(phi, work), "cache": cache_bytes(phi, work)}
    return Plan({**held, **decoding, "program": program}, base + copy + sum(decoding.values()), work.slots)


def _decoding_terms(phi: PhiSizes, work: Workload, num_passes: int, free: int) -> dict[str, int]:
    return {
        "copy": copy_bytes(phi, work, num_passes, free),
        "cache": cache_bytes(phi, work),
        "work space": prefill_bytes(phi, work),
    }


# What to change


def changes_to_fit(phi: PhiSizes, work: Workload, program: int, memory: int) -> list[str] | None:
    """The keys with which fit would need no more than the memory: one if one is enough, else several.

    They are tried from the least to the most costly: fewer rows in a micro-batch change nothing but speed, a shorter
    max_length changes what is learned.

    Returns:
        "key value" each; none if it fits as it is; None if no change of these is enough.
    """

    def fits(changed: Workload) -> bool:
        return plan_fit(phi, changed, program, memory).needed <= memory

    if fits(work):
        return []
    for change in _CHANGES:
        for name, changed in change(work):
            if fits(changed):
                return [name]
    together = work
    names: list[str] = []
    for change in _CHANGES:
        changes = change(together)
        for name, changed in changes:
            if fits(changed):
                return [*names, name]
        if changes:
            name, together = changes[-1]
            names.append(name)
    return None


def _fewer_rows(work: Workload) -> list[tuple[str, Workload]]:
    return [(f"data.batch_size {rows}", replace(work, rows=rows)) for rows in range(work.rows - 1, 0, -1)]


def _checkpointing(work: Workload) -> list[tuple[str, Workload]]:
    if work.activation_checkpointing:
        return []
    return [("model.activation_checkpointing true", replace(work, activation_checkpointing=True))]


def _half_precision(work: Workload) -> list[tuple[str, Workload]]:
    if work.dtype != torch.float32 or work.device_type == "mps":
        return []
    return [("model.dtype bfloat16", replace(work, dtype=torch.bfloat16))]


def _quantized(work: Workload) -> list[tuple[str, Workload]]:
    return [] if work.quantized else [("model.quantization int8", replace(work, quantized=True))]


def _shorter_rows(work: Workload) -> list[tuple[str, Workload]]:
    lengths = range((work.row_length - 1) // 64 * 64, SHORTEST_ROW - 1, -64)
    return [(f"data.max_length {length}", _with_length(work, length)) for length in lengths]


def _with_length(work: Workload, length: int) -> Workload:
    return replace(
        work,
        row_length=length,
        supervised=min(work.supervised, length),
        longest_example=min(work.longest_example, length),
        prompt_length=min(work.prompt_length, length),
    )


# From the least to the most costly.
_CHANGES: tuple[Callable[[Workload], list[tuple[str, Workload]]], ...] = (
    _fewer_rows,
    _checkpointing,
    _half_precision,
    _quantized,
    _shorter_rows,
)
