r"""Optimizer and learning-rate schedule: AdamW, linear warm-up, then cosine to zero.

    factor  1 |    /\_                     step counts optimizer steps from 0
              |   /   \_                   the factor multiplies the peak learning rate
            0 |  /      \__             of A; with lora_plus_ratio that of B is a multiple of it
              +--|----------|---> step
               warmup     total

The schedule needs the length of the whole run. It comes from the data module: Lightning's estimated_stepping_batches
builds the train loader early, which then starts at the wrong batch on resume.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_phi2.errors import InputError


def build_optimizer(
    parameters: Mapping[str, nn.Parameter],
    *,
    learning_rate: float,
    weight_decay: float,
    lora_plus_ratio: float | None = None,
) -> AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) with torch's default betas.

    Args:
        parameters: the A and B of an adapter, by PEFT's names.
        learning_rate: the peak.
        weight_decay: of AdamW.
        lora_plus_ratio: the learning rate of every B is this times that of A (LoRA+, Hayou et al. 2024,
            arXiv:2402.12354); None is LoRA, with one learning rate in one group.
    """
    groups: Any = parameters.values()
    if lora_plus_ratio is not None:
        of_b = [parameter for name, parameter in parameters.items() if ".lora_B." in name]
        of_a = [parameter for name, parameter in parameters.items() if ".lora_B." not in name]
        groups = [{"params": of_a}, {"params": of_b, "lr": lora_plus_ratio * learning_rate}]
    # fused: one call for all small tensors of an adapter; CPU, CUDA and MPS support it
    return AdamW(groups, lr=learning_rate, weight_decay=weight_decay, fused=True)


def build_schedule(optimizer: Optimizer, *, warmup_ratio: float, total_steps: int) -> LambdaLR:
    """The learning rate over all optimizer steps; a started step of warm-up counts whole."""
    warmup = math.ceil(warmup_ratio * total_steps)
    return LambdaLR(optimizer, lambda step: warmup_then_cosine(step, warmup_steps=warmup, total_steps=total_steps))


def warmup_then_cosine(step: int, *, warmup_steps: int, total_steps: int) -> float:
    """Factor of the peak learning rate at a step counted from 0: linear warm-up, then half a cosine down to zero.

    >>> [round(warmup_then_cosine(step, warmup_steps=2, total_steps=10), 3) for step in (0, 1, 2, 6, 10)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def total_steps(steps_per_epoch: int, max_epochs: int | None, max_steps: int) -> int:
    """Optimizer steps of the whole run.

    Args:
        steps_per_epoch: 0 where limit_train_batches leaves no micro-batch.
        max_epochs: None or -1 for no limit.
        max_steps: -1 for no limit.

    Raises:
        InputError: there is no limit, or the limits leave no step.

    >>> total_steps(10, max_epochs=3, max_steps=25)
    25
    """
    limits = []
    if max_epochs is not None and max_epochs != -1:
        limits.append(steps_per_epoch * max_epochs)
    if max_steps != -1:
        limits.append(max_steps)
    if not limits:
        raise InputError(
            "trainer.max_epochs and trainer.max_steps: one must be set; the learning-rate schedule needs an end."
        )
    if min(limits) == 0:
        raise InputError(
            "trainer: max_epochs, max_steps and limit_train_batches leave nothing to train; each must be above 0."
        )
    return min(limits)
