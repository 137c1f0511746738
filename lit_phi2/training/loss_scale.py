"""Loss scale: keeps the gradients of float16 activations inside float16's range.

    loss x scale -> backward in float16 -> float32 gradients of A and B, / scale -> finite: clipping, AdamW
                                                                                 -> else: no step, half the scale

float16 ends at 65,504 and at 6e-8, and gradients of activations may be smaller, so they are computed as multiples. The
arithmetic is that of torch.amp.GradScaler, on plain numbers: the module reads the norm of the gradients in every step
anyway. Every factor is a power of two, so scaling rounds nothing.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from lit_phi2.utils.json_objects import Kind, check_values, integer, number

log = logging.getLogger(__name__)

INITIAL_SCALE = 2.0**16
MIN_SCALE = 1.0  # gradients that are not finite without any scale are not finite for another reason
GROWTH_INTERVAL = 2000  # steps in a row after which the scale doubles

_STEPS = Kind("a list of steps", lambda value: isinstance(value, list) and all(type(step) is int for step in value))
_STATE = {
    "scale": number(MIN_SCALE, 2.0**127),
    "good_steps": integer(0, GROWTH_INTERVAL - 1),
    "skipped_steps": _STEPS,
}


@dataclass(slots=True)
class LossScale:
    """The scale of the next loss, and what it was decided by.

    Attributes:
        scale: factor of the loss.
        good_steps: taken in a row since the scale last changed.
        skipped_steps: optimizer steps, from 1, that were not taken because a gradient was not finite.
    """

    scale: float = INITIAL_SCALE
    good_steps: int = 0
    skipped_steps: list[int] = field(default_factory=list)

    def unscale_(self, gradients: Iterable[Tensor]) -> None:
        """Divide gradients by the scale, in place."""
        for gradient in gradients:
            gradient.mul_(1 / self.scale)

    @property
    def can_shrink(self) -> bool:
        """Whether a smaller scale may make the gradients finite."""
        return self.scale > MIN_SCALE

    def step_taken(self) -> None:
        """The gradients were finite: after GROWTH_INTERVAL such steps the scale doubles."""
        self.good_steps += 1
        if self.good_steps == GROWTH_INTERVAL:
            self.scale, self.good_steps = min(2 * self.scale, 2.0**127), 0

    def step_skipped(self, step: int) -> None:
        """They were not: halve the scale.

        Args:
            step: the optimizer step, from 1.
        """
        self.scale, self.good_steps = self.scale / 2, 0
        self.skipped_steps.append(step)
        log.info(
            "step %d is skipped: float16 gradients overflow; the loss scale is now %g, %d steps are skipped so far",
            step,
            self.scale,
            len(self.skipped_steps),
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any], *, source: str) -> None:
        """Continue with the values of a checkpoint.

        Raises:
            InputError: a value is missing or out of range.
        """
        check_values(state, _STATE, source=f"{source}: loss_scale", required=_STATE)
        self.scale, self.good_steps = float(state["scale"]), state["good_steps"]
        self.skipped_steps = list(state["skipped_steps"])


def new_loss_scale(dtype: torch.dtype) -> LossScale | None:
    """A scale at its first value; None for dtypes with the range of float32."""
    return LossScale() if dtype == torch.float16 else None
