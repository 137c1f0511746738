"""Loss: hidden states and labels -> summed nats and the number of supervised tokens.

    hidden   h0 h1 h2 h3 h4        the state at t is scored against the label at t + 1
    labels   .  .  .  r  E         so here only h2 and h3 reach the head

Phi-2's head is 51,200 x 2,560: prompt and padding rows never pay for it.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name that torch's own documentation uses

from lit_phi2.batch import IGNORE_INDEX


class Loss(NamedTuple):
    """Sums, so that batches can be added up and every token weighs the same.

    Attributes:
        nats: scalar float32, summed cross-entropy over supervised tokens.
        tokens: scalar int64, supervised tokens.
        correct: scalar int64, supervised tokens whose logit is the largest.
    """

    nats: Tensor
    tokens: Tensor
    correct: Tensor


def causal_lm_loss(hidden: Tensor, labels: Tensor, head: nn.Module) -> Loss:
    """Summed next-token cross-entropy over supervised tokens.

    Args:
        hidden: (B, T, D), any float type.
        labels: (B, T) int64; IGNORE_INDEX where no loss is wanted (prompt, padding).
        head: (N, D) -> (N, V); sees supervised positions only. Its logits are reduced in float32.

    Returns:
        Sums. Without a supervised token the nats are zero and still connected to the hidden states, so that
        backward works on a rank that has nothing to do.

    Raises:
        ValueError: hidden and labels do not cover the same tokens.

    >>> labels = torch.tensor([[IGNORE_INDEX, 2, 5]])
    >>> loss = causal_lm_loss(torch.zeros(1, 3, 4), labels, nn.Linear(4, 8, bias=False))
    >>> round((loss.nats / loss.tokens).item(), 4), loss.tokens.item()  # uniform logits: ln 8, two tokens
    (2.0794, 2)
    """
    if hidden.shape[:2] != labels.shape:
        raise ValueError(f"hidden covers {tuple(hidden.shape[:2])} tokens but labels {tuple(labels.shape)}")
    targets = labels[:, 1:]
    supervised = targets != IGNORE_INDEX
    picked, targets = hidden[:, :-1][supervised], targets[supervised]
    if not len(targets):
        zero = torch.zeros((), dtype=torch.int64, device=hidden.device)
        return Loss(nats=hidden.float().sum() * 0.0, tokens=zero, correct=zero)
    logits = head(picked).float()
    nats = F.cross_entropy(logits, targets, reduction="sum")
    return Loss(nats, supervised.sum(), (logits.detach().argmax(-1) == targets).sum())
