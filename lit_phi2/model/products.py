"""Products: activations times weights that stay as they are, in bfloat16 also on a CPU that cannot multiply it.

    x (N, in), W (out, in) -> x W^T (N, out)
    g (N, out), W (out, in) -> g W (N, in)

On a CPU torch multiplies bfloat16 by AMX or AVX512-BF16. Without them it has loops that take seven times as long as a
product in float32, and backward three hundred times. There W becomes float32 a piece at a time, each small enough for a
cache: float32's pace, with half of its memory for the weights. The sums are float32's, as AMX keeps them.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812  the name that torch's own documentation uses

from lit_phi2.devices import multiplies_bfloat16

EMULATED = not multiplies_bfloat16(torch.device("cpu"))[0]
PIECE = 2**21  # weights that are float32 at a time: 8 MiB
FEW = 4  # rows up to which torch's own loops are the faster ones: answers are written one token at a time


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which x, (N, ...), is best multiplied: its own, or float32 in place of bfloat16."""
    emulated = EMULATED and x.dtype == torch.bfloat16 and x.device.type == "cpu" and len(x) > FEW
    return torch.float32 if emulated else x.dtype


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """x W^T + bias, (N, in) -> (N, out), in the dtype of x; without a gradient.

    Args:
        x: in product_dtype.
        weight, bias: (out, in) and (out,), in the dtype of x or in bfloat16.
        out: where to write it.
    """
    if x.dtype == weight.dtype:
        return F.linear(x, weight, bias) if out is None else torch.mm(x, weight.t(), out=out)
    out = x.new_empty(len(x), len(weight)) if out is None else out
    if len(weight) < weight.shape[1]:
        out.zero_()
        for some in _pieces(weight):
            out.addmm_(x[:, some], weight[:, some].to(x.dtype).t())
    else:
        for some in _pieces(weight):
            out[:, some] = x @ weight[some].to(x.dtype).t()
    return out if bias is None else out.add_(bias)


def project_back(grad: Tensor, weight: Tensor) -> Tensor:
    """g W, (N, out) -> (N, in): the gradient of x from that of x W^T, in its dtype."""
    if grad.dtype == weight.dtype:
        return grad @ weight
    if len(weight) < weight.shape[1]:
        out = grad.new_empty(len(grad), weight.shape[1])
        for some in _pieces(weight):
            out[:, some] = grad @ weight[:, some].to(grad.dtype)
        return out
    out = grad.new_zeros(len(grad), weight.shape[1])
    for some in _pieces(weight):
        out.addmm_(grad[:, some], weight[some].to(grad.dtype))
    return out


def _pieces(weight: Tensor) -> list[slice]:
    """Along the longer side, so that what is multiplied by them, the shorter one wide, is read over and over."""
    shorter, longer = sorted(weight.shape)
    width = max(1, PIECE // shorter)
    return [slice(start, min(start + width, longer)) for start in range(0, longer, width)]


class FrozenLinear(nn.Linear):
    """nn.Linear, whose frozen weights are multiplied as above."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        flat = input.reshape(-1, input.shape[-1])
        if self.weight.requires_grad or product_dtype(flat) == input.dtype:
            return super().forward(input)
        output: Tensor = _Project.apply(flat, self.weight, self.bias)
        return output.view(*input.shape[:-1], -1)


class _Project(torch.autograd.Function):
    """x W^T + bias and its gradient to x, (N, in) -> (N, out), in product_dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return project(x.to(product_dtype(x)), weight, bias).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        (weight,) = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return project_back(grad.to(product_dtype(grad)), weight).to(grad.dtype), None, None
