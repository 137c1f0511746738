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

from lit_phi2.model.linear import frozen_matmul, matmul_dtype
from lit_phi2.types import IGNORE_INDEX

LOGITS_BYTES = 64 * 2**20  # at most, of logits at one time, whatever the batch
VOCAB_CHUNK = {"cpu": 4096}  # tokens of the vocabulary at a time, at most, where a cache is to hold their logits
PAD_ROWS_TO = 32  # positions in the head's products are a multiple of it


class Loss(NamedTuple):
    """Sums, so that batches can be added up and every token weighs the same.

    Attributes:
        nats: scalar float32, summed cross-entropy over supervised tokens.
        num_tokens: scalar int64, supervised tokens.
        num_correct: scalar int64, supervised tokens whose logit is the largest; of equal ones the first, except with
            gradients, where it is as good to be one of them.
    """

    nats: Tensor
    num_tokens: Tensor
    num_correct: Tensor


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
    >>> round((loss.nats / loss.num_tokens).item(), 4), loss.num_tokens.item()  # uniform logits: ln 8, two tokens
    (2.0794, 2)
    """
    if hidden.shape[:2] != labels.shape:
        raise ValueError(f"hidden covers {tuple(hidden.shape[:2])} tokens but labels {tuple(labels.shape)}")
    targets = labels[:, 1:]
    supervised = targets != IGNORE_INDEX
    picked, targets = hidden[:, :-1][supervised], targets[supervised]
    if not len(targets):
        zero = torch.zeros((), dtype=torch.int64, device=hidden.device)
        return Loss(nats=hidden.float().sum() * 0.0, num_tokens=zero, num_correct=zero)
    if isinstance(head, nn.Linear) and not any(parameter.requires_grad for parameter in head.parameters()):
        nats, correct = _ChunkedCrossEntropy.apply(picked, head.weight, head.bias, targets)
        return Loss(nats, supervised.sum(), correct)
    logits = head(picked)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nats = F.cross_entropy(logits, targets, reduction="sum")
    return Loss(nats, supervised.sum(), (logits.detach().argmax(-1) == targets).sum())


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of a frozen head, a slice of the vocabulary at a time, so that logits take LOGITS_BYTES at most.

    The softmax is carried from slice to slice by its largest logit and its sum, as online softmax does (Milakov and
    Gimelshein 2018, arXiv:1805.02867), so every product has all positions and every weight is read once each way. The
    gradient of the hidden states is gathered on the way; backward only has to scale it.

    All slices are worked on in the same memory, small enough for a cache, and positions are rounded up to ROWS: a
    product of a shape that was not seen before is compiled first, for longer than it takes.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        num, exact = len(hidden), torch.promote_types(hidden.dtype, torch.float32)
        column = hidden.new_zeros(num, 1, dtype=exact)
        largest, total, at_target = torch.full_like(column, float("-inf")), column.clone(), column.clone()
        best = torch.zeros_like(targets)
        # Of the other tokens: their weights, each times exp(its logit - largest).
        mixed = torch.zeros_like(hidden, dtype=exact) if ctx.needs_input_grad[0] else None
        padded = F.pad(hidden.to(matmul_dtype(hidden)), (0, 0, 0, -num % PAD_ROWS_TO))
        most = max(1, LOGITS_BYTES // (len(padded) * (exact.itemsize + padded.dtype.itemsize)))
        most = min(most, VOCAB_CHUNK.get(hidden.device.type, most))
        width = -(-len(weight) // -(-len(weight) // most))  # slices of about the same width
        scores = hidden.new_empty(num * width, dtype=exact)
        for start in range(0, len(weight), width):
            part = weight[start : start + width]
            product = frozen_matmul(padded, part.t())
            logits = scores[: num * len(part)].view(num, -1).copy_(product[:num])
            if bias is not None:
                logits.add_(bias[start : start + width])
            # Masks, not indices of the targets that are here: a GPU would have to be waited for at each slice.
            place = (targets - start)[:, None]
            here = (place >= 0) & (place < len(part))
            place = place.clamp(0, len(part) - 1)
            at_target = torch.where(here, logits.gather(1, place), at_target)
            top = logits.amax(-1, keepdim=True)
            if mixed is None:  # where it is measured; finding the place takes ten times as long as finding the value
                best = torch.where((top > largest).flatten(), logits.argmax(-1) + start, best)
            before, largest = largest, torch.maximum(largest, top)
            shrink = (before - largest).exp_()
            terms = logits.sub_(largest).exp_()
            total = total.mul_(shrink).add_(terms.sum(-1, keepdim=True))
            if mixed is not None:
                # Not the target's: where it is nearly sure, its share less one is small, and would drown in rounding.
                terms.scatter_(1, place, terms.gather(1, place).masked_fill_(here, 0))
                product[:num] = terms
                mixed.mul_(shrink).add_(frozen_matmul(product, part)[:num])
            del product  # or two of them would be held at once
        nats = (largest + total.log() - at_target).sum()
        grad = None
        if mixed is not None:
            missing = (at_target - largest).exp_().div_(total).sub_(1)  # softmax at the target, less one
            grad = mixed.div_(total).addcmul_(missing, weight[targets].to(exact)).to(hidden.dtype)
        correct = (best == targets).sum() if mixed is None else (at_target == largest).sum()
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(correct)
        return nats, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nats: Tensor, _: Tensor) -> tuple[Tensor | None, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_nats.to(grad.dtype) if grad is not None else None, None, None, None
