"""training/optim.py."""

import math


def warmup_then_cosine(step: int, *, warmup_steps: int, total_steps: int) -> float:
    """Share of the peak learning rate at a step counted from 0: a line up, then half a cosine down to zero.

    >>> [round(warmup_then_cosine(step, warmup_steps=2, total_steps=10), 3) for step in (0, 1, 2, 6, 10)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
