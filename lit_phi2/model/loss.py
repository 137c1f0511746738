"""Loss: hidden states and labels -> summed nats and the number of supervised tokens.

    hidden   h0 h1 h2 h3 h4        the state at t is scored against the label at t + 1
    labels   .  .  .  r  E         so here only h2 and h3 reach the head

Phi-2's head is 51,200 x 2,560: prompt and padding rows never pay for it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812  the name that torch's own documentation uses

from lit_phi2.batch import IGNORE_INDEX

LOGITS_BYTES = 64 * 2**20  # at most, of logits at one time, whatever the batch


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
    if type(head) is nn.Linear and not any(parameter.requires_grad for parameter in head.parameters()):
        nats, correct = _HeadLoss.apply(picked, head.weight, head.bias, targets)
        return Loss(nats, supervised.sum(), correct)
    logits = head(picked)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nats = F.cross_entropy(logits, targets, reduction="sum")
    return Loss(nats, supervised.sum(), (logits.detach().argmax(-1) == targets).sum())


class _HeadLoss(torch.autograd.Function):
    """Cross-entropy of a frozen head, a chunk of positions at a time, so that logits never take more than LOGITS_BYTES.

    The gradient of the hidden states is worked out right away, in the memory of the logits, so that backward only has
    to scale it.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        wants_grad = ctx.needs_input_grad[0]
        exact = torch.promote_types(hidden.dtype, torch.float32)
        nats = torch.zeros((), dtype=exact, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        grad = torch.empty_like(hidden) if wants_grad else None
        rows = max(1, LOGITS_BYTES // (len(weight) * (exact.itemsize + hidden.dtype.itemsize)))
        for start in range(0, len(hidden), rows):
            labels = targets[start : start + rows, None]
            logits = F.linear(hidden[start : start + rows], weight, bias).to(exact)
            correct += (logits.argmax(-1, keepdim=True) == labels).sum()
            largest = logits.amax(-1, keepdim=True)
            nats -= (logits.gather(-1, labels) - largest).sum()
            total = logits.sub_(largest).exp_().sum(-1, keepdim=True)
            nats += total.log().sum()
            if grad is not None:
                share = logits.div_(total)  # softmax; less one at the target it is the gradient
                share.scatter_add_(-1, labels, torch.full_like(total, -1.0))
                torch.mm(share.to(hidden.dtype), weight, out=grad[start : start + rows])
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(correct)
        return nats, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nats: Tensor, _: Tensor) -> tuple[Tensor | None, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_nats.to(grad.dtype) if grad is not None else None, None, None, None
