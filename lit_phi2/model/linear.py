"""Products: activations times weights that stay as they are, in bfloat16 also on a CPU that cannot multiply it.

    x (N, K), matrix (K, M) -> x matrix (N, M)        W^T on the way forward, W on the way back

On a CPU torch multiplies bfloat16 by AMX or AVX512-BF16. Without them it has loops that take seven times as long as a
product in float32, and backward three hundred times. There the matrix becomes float32 a piece at a time, each small
enough for a cache: float32's pace, with half of its memory. The sums are float32's, as AMX keeps them, and are rounded
once.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lit_phi2.model.device import has_native_bf16

EMULATE_BF16 = not has_native_bf16(torch.device("cpu"))[0]
PIECE = 2**21  # elements that are float32 at a time: 8 MiB
EMULATION_MIN_ROWS = (
    4  # rows up to which torch's own loops are the faster ones: answers are written one token at a time
)


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which x, (N, ...), is best multiplied: its own, or float32 in place of bfloat16."""
    emulated = EMULATE_BF16 and x.dtype == torch.bfloat16 and x.device.type == "cpu" and len(x) > EMULATION_MIN_ROWS
    return torch.float32 if emulated else x.dtype


def frozen_matmul(
    x: Tensor,
    matrix: Tensor,
    *,
    bias: Tensor | None = None,
    low: Tensor | None = None,
    up: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """x matrix + bias + scale low up, (N, K) -> (N, M), in the dtype of x; without a gradient.

    Args:
        x: (N, K).
        matrix: (K, M), in the dtype of x or in bfloat16.
        bias: (M,).
        low, up: (N, r) and (r, M), an update of low rank; both or none.
        scale: of the update.
    """
    dtype = matmul_dtype(x)
    if dtype == matrix.dtype:
        out = x @ matrix if bias is None else torch.addmm(bias, x, matrix)
        return out if low is None or up is None else out.addmm_(low.to(dtype), up.to(dtype), alpha=scale)
    rows, columns = matrix.shape
    # Along the longer side, so that what is multiplied by the pieces is small and is read over and over.
    width = max(1, PIECE // max(len(x), min(rows, columns)))
    pieces = [slice(start, start + width) for start in range(0, max(rows, columns), width)]
    if rows <= columns:
        out, exact = x.new_empty(len(x), columns), x.to(dtype)
        for some in pieces:
            out[:, some] = _add_bias_and_lora(exact @ matrix[:, some].to(dtype), some, bias, low, up, scale)
        return out
    total = x.new_zeros(len(x), columns, dtype=dtype)
    for some in pieces:
        total.addmm_(x[:, some].to(dtype), matrix[some].to(dtype))
    return _add_bias_and_lora(total, slice(None), bias, low, up, scale).to(x.dtype)


def _add_bias_and_lora(
    total: Tensor, some: slice, bias: Tensor | None, low: Tensor | None, up: Tensor | None, scale: float
) -> Tensor:
    """Add, in place, what belongs to some columns."""
    if bias is not None:
        total.add_(bias[some])
    if low is not None and up is not None:
        total.addmm_(low.to(total.dtype), up[:, some].to(total.dtype), alpha=scale)
    return total


class FrozenLinear(nn.Linear):
    """nn.Linear, whose frozen weights are multiplied as above."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        flat = input.reshape(-1, input.shape[-1])
        if self.weight.requires_grad or matmul_dtype(flat) == input.dtype:
            return super().forward(input)
        output: Tensor = _FrozenLinearFn.apply(flat, self.weight, self.bias)
        return output.view(*input.shape[:-1], -1)


class _FrozenLinearFn(torch.autograd.Function):
    """x W^T + bias, (N, in) -> (N, out), and its gradient to x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return frozen_matmul(x, weight.t(), bias=bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        (weight,) = ctx.saved_tensors
        return frozen_matmul(grad, weight) if ctx.needs_input_grad[0] else None, None, None
