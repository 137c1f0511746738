"""Elementwise: what stands between the products of a block, in few passes over memory.

    fc1's output (N, F) -> GELU -> (N, F)
    hidden + dropout(attended) + dropout(thought), each (N, D) -> (N, D)

On a CPU with AMX a product of Phi-2's width takes some ten milliseconds, and torch's own tanh or dropout over its
output as long again. A GPU has kernels for both, which are used there.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812  the name that torch's own documentation uses

PIECE = 2**17  # elements that GELU works on at a time: a few float32 copies of them fit a core's cache


def gelu(x: Tensor) -> Tensor:
    """GELU by tanh (Hendrycks and Gimpel 2016, arXiv:1606.08415), which transformers calls gelu_new.

    >>> gelu(torch.tensor([1.0], requires_grad=True)).item() == F.gelu(torch.tensor(1.0), approximate="tanh").item()
    True
    """
    if x.device.type == "cpu" and x.requires_grad and torch.is_grad_enabled():
        result: Tensor = _Gelu.apply(x)
        return result
    return F.gelu(x, approximate="tanh")


class _Gelu(torch.autograd.Function):
    """x sigmoid(2 u) = 0.5 x (1 + tanh u), where u = sqrt(2 / pi) (x + 0.044715 x^3).

    A sigmoid costs a third of a tanh, and one of them gives value and slope: the slope is kept in place of x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        flat, exact = x.reshape(-1), torch.promote_types(x.dtype, torch.float32)
        value, slope = torch.empty_like(flat), torch.empty_like(flat)
        linear = torch.tensor(2 * math.sqrt(2 / math.pi), dtype=exact)
        cubic = 0.044715 * linear.item()
        for start in range(0, len(flat), PIECE):
            some = slice(start, start + PIECE)
            piece = flat[some].to(exact)
            share = torch.addcmul(linear, piece, piece, value=cubic).mul_(piece).sigmoid_()
            product = piece * share
            value[some] = product
            # The slope is share + x share (1 - share) (2 u)'.
            rest = torch.addcmul(product, product, share, value=-1)
            slope[some] = torch.addcmul(linear, piece, piece, value=3 * cubic).mul_(rest).add_(share)
        ctx.save_for_backward(slope)
        return value.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return grad * slope.view_as(grad)


def dropout_add_residual(hidden: Tensor, attended: Tensor, thought: Tensor, *, dropout: float) -> Tensor:
    """hidden + dropout(attended) + dropout(thought), drawn from torch's default generator.

    Args:
        hidden, attended, thought: of one shape.
        dropout: the share that is dropped; on a CPU the nearest of 65,536 ones.
    """
    dropped = round(dropout * 2**16)
    if dropped and hidden.device.type == "cpu":
        keep_attended, keep_thought = _sample_dropout_mask(hidden, dropped), _sample_dropout_mask(hidden, dropped)
        grow = 2**16 / (2**16 - dropped)
        total: Tensor = _DropoutAddResidual.apply(hidden, attended, thought, keep_attended, keep_thought, grow)
        return total
    return F.dropout(attended, dropout).add_(F.dropout(thought, dropout)).add_(hidden)


def _sample_dropout_mask(like: Tensor, dropped: int) -> Tensor:
    """Which elements dropout keeps, 1 or 0 in int8, where it drops so many of 65,536.

    Four elements to a number of 64 bits, from a small fast generator whose seed torch draws: torch's own draws one
    number after another on a CPU, and would take longer than all else that stands between two products. int8, because
    torch turns it into another dtype five times as fast as bool.
    """
    seed = int(torch.randint(2**63 - 1, ()))
    numbers = np.random.SFC64(seed).random_raw(-(-like.numel() // 4))
    draws = torch.from_numpy(numbers.view(np.int16))[: like.numel()].view(like.shape)
    return draws.ge_(dropped - 2**15).to(torch.int8)


class _DropoutAddResidual(torch.autograd.Function):
    """hidden + dropout(attended) + dropout(thought): what is kept is given, and what it is multiplied by."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        attended: Tensor,
        thought: Tensor,
        keep_attended: Tensor,
        keep_thought: Tensor,
        grow: float,
    ) -> Tensor:
        ctx.save_for_backward(keep_attended, keep_thought)
        ctx.grow = grow
        total = torch.addcmul(hidden, attended, keep_attended.to(hidden.dtype), value=grow)
        return total.addcmul_(thought, keep_thought.to(hidden.dtype), value=grow)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grown = grad * ctx.grow
        attended, thought = (keep.to(grad.dtype).mul_(grown) for keep in ctx.saved_tensors)
        return grad, attended, thought, None, None, None
