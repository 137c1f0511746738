"""Sums over an accumulation window and over an evaluation; both become means over supervised tokens.

    micro-batches   nats, num_tokens  |  nats, num_tokens  ->  sums over all ranks -> loss = nats / num_tokens
                    -------- one accumulation window -----

A mean of batch means or of rank means is not the mean over tokens, so only sums are kept until the end.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torchmetrics import SumMetric

from lit_phi2.errors import NonFiniteError
from lit_phi2.model.loss import Loss
from lit_phi2.types import Batch


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
        self.batches: list[Batch] = []

    def add(self, loss: Loss, batch: Batch) -> None:
        """Add a micro-batch, which is kept until the end of the window."""
        self.nats.append(loss.nats.detach())
        self.num_tokens.append(loss.num_tokens)
        self.batches.append(batch)

    def close(
        self,
        strategy: Strategy,
        *,
        grad_norm: float,
        step: int,
        can_skip: bool,
        describe_overflow: Callable[[Sequence[Batch]], str | None],
    ) -> WindowLoss:
        """Sum over all micro-batches and ranks, and begin the next window.

        Args:
            strategy: reduces over ranks.
            grad_norm: of the step.
            step: the optimizer step about to be taken, from 1.
            can_skip: whether gradients that are not finite are no error: another loss scale may make them finite.
            describe_overflow: where the forward pass is not finite; None if it is finite.

        Raises:
            NonFiniteError: the loss or the forward pass is not finite, or the gradient norm and can_skip is False;
                names the record of this rank in which it begins, or its records.
        """
        sums = torch.stack([torch.stack(self.nats).sum(), torch.stack(self.num_tokens).sum()])
        nats, num_tokens = strategy.reduce(sums, reduce_op="sum").tolist()
        loss = nats / max(num_tokens, 1)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            description = describe_overflow(self.batches)
            num_ranks = strategy.reduce(sums.new_tensor(float(description is not None)), reduce_op="sum").item()
            if not (can_skip and math.isfinite(loss)) or num_ranks:
                records = ", ".join(location for batch in self.batches for location in batch.locations)
                raise NonFiniteError(
                    f"step {step}: the loss is {loss} and the gradient norm {grad_norm}; the step was not taken. "
                    + (description or f"The records in it: {records}")
                )
        self.nats.clear()
        self.num_tokens.clear()
        self.batches.clear()
        return WindowLoss(loss, num_tokens)


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
