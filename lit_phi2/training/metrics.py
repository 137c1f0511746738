"""Sums over an accumulation window and over an evaluation; both become means over supervised tokens.

    micro-batches   nats, num_tokens  |  nats, num_tokens  ->  sums over all ranks -> loss = nats / num_tokens
                    -------- one accumulation window -----

A mean of batch means or of rank means is not the mean over tokens, so only sums are kept until the end.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torchmetrics import SumMetric

from lit_phi2.errors import NonFiniteError
from lit_phi2.model.loss import Loss


class WindowLoss(NamedTuple):
    """The loss of an optimizer step, over all ranks.

    Attributes:
        loss: nats per supervised token.
        num_tokens: supervised tokens.
    """

    loss: float
    num_tokens: float


class AccumulationWindow:
    """Collects the micro-batches of one optimizer step on this rank; on the device until the step, without a sync."""

    def __init__(self) -> None:
        self.nats: list[Tensor] = []
        self.num_tokens: list[Tensor] = []
        self.locations: list[str] = []

    def add(self, loss: Loss, locations: Sequence[str]) -> None:
        """Add a micro-batch, with the locations of its records."""
        self.nats.append(loss.nats.detach())
        self.num_tokens.append(loss.num_tokens)
        self.locations.extend(locations)

    def close(self, strategy: Strategy, *, grad_norm: float, step: int) -> WindowLoss:
        """Sum over all micro-batches and ranks, and begin the next window.

        Args:
            strategy: reduces over ranks.
            grad_norm: of the step.
            step: the optimizer step about to be taken, from 1.

        Raises:
            NonFiniteError: the loss or the gradient norm is not finite; names the records of this rank.
        """
        sums = torch.stack([torch.stack(self.nats).sum(), torch.stack(self.num_tokens).sum()])
        nats, num_tokens = strategy.reduce(sums, reduce_op="sum").tolist()
        if not (math.isfinite(nats) and math.isfinite(grad_norm)):
            raise NonFiniteError(
                f"step {step}: the loss is {nats / max(num_tokens, 1)} and the gradient norm {grad_norm}; "
                f"the step was not taken. The records in it: {', '.join(self.locations)}"
            )
        self.nats.clear()
        self.num_tokens.clear()
        self.locations.clear()
        return WindowLoss(nats / num_tokens, num_tokens)


class EvalSums(nn.ModuleDict):
    """Nats and token counts of an evaluation, summed over batches and ranks.

    A NaN must count, but by default torchmetrics drops it. Not MeanMetric: with nan_strategy="disable" it ignores its
    weights in torchmetrics 1.9.
    """

    def __init__(self) -> None:
        super().__init__({name: SumMetric(nan_strategy="disable") for name in Loss._fields})

    def add(self, loss: Loss) -> None:
        """Add a batch."""
        for name, value in loss._asdict().items():
            self[name](value)

    def close(self) -> Loss:
        """The sums over all batches and ranks; the next evaluation begins at zero."""
        total = Loss(*(self[name].compute() for name in Loss._fields))  # type: ignore[operator]  # typed as Module
        self.reset()
        return total

    def reset(self) -> None:
        """Begin at zero."""
        for metric in self.values():
            metric.reset()  # type: ignore[operator]


def eval_metrics(stage: str, total: Loss) -> dict[str, Tensor]:
    """Loss, perplexity and token accuracy of an evaluation, by the names of their curves.

    >>> total = Loss(torch.tensor(6.0), torch.tensor(3.0), torch.tensor(2.0))
    >>> {name: round(value.item(), 2) for name, value in eval_metrics("val", total).items()}
    {'val/loss': 2.0, 'val/perplexity': 7.39, 'val/token_accuracy': 0.67}
    """
    loss, accuracy = total.nats / total.num_tokens, total.num_correct / total.num_tokens
    return {f"{stage}/loss": loss, f"{stage}/perplexity": loss.exp(), f"{stage}/token_accuracy": accuracy}
