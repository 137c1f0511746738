"""Linear: matrix products with frozen weights, and the linear layer that holds such weights.

    x (N, K) @ matrix (K, M) -> (N, M)        W^T in the forward pass, W in the backward pass

Only some CPUs multiply bfloat16 faster than float32: those with AMX, and some of those with AVX512-BF16. Without
either, torch falls back to loops that take seven times as long as float32 in the forward pass and three hundred times
as long in the backward pass. Where float32 is faster the matrix is converted to it in chunks that fit a cache, which
gives the speed of float32 with half its memory. Sums are kept in float32, as AMX does, and rounded once. float16 is
always multiplied in float32: few CPUs have products of it, and torch's loops for the others are slow.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lit_phi2.model.device import has_fast_bf16

CHUNK_NUMEL = 2**21  # elements of a weight that are float32 at the same time: 8 MiB
ALL = slice(None)
EMULATION_MIN_ROWS = 5  # with fewer rows torch's own loops are faster: decoding multiplies one token per completion


class FrozenLinear(nn.Linear):
    """nn.Linear for weights that are not trained.

    `matmul`, `matmul_t` and `rows` are the only ways in which the LoRA layer and the loss read the weight, so another
    storage format can replace them (`quantization.py`).
    """

    @property
    def dtype(self) -> torch.dtype:
        """Of results and of `rows`."""
        return self.weight.dtype

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out); differentiable in the input."""
        if self.weight.requires_grad or matmul_dtype(input.flatten(0, -2)) == self.weight.dtype:
            return super().forward(input)
        return self.frozen_forward(input)

    def frozen_forward(self, input: Tensor) -> Tensor:
        """`forward` by `matmul`, and its gradient by `matmul_t`."""
        output: Tensor = _FrozenLinearFn.apply(input.reshape(-1, input.shape[-1]), self)
        return output.view(*input.shape[:-1], -1)

    def matmul(
        self,
        x: Tensor,
        *,
        features: slice = ALL,
        use_bias: bool = True,
        lora_x: Tensor | None = None,
        lora_b: Tensor | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        """x W^T + bias + scale lora_x lora_b, (N, in) -> (N, out), without a gradient.

        Args:
            x: (N, in).
            features: of the output, that are computed.
            use_bias: whether the bias is added.
            lora_x, lora_b: (N, r) and (r, out), a low-rank update; both or neither.
            scale: of the update.
        """
        bias = self.bias[features] if use_bias and self.bias is not None else None
        return frozen_matmul(x, self.weight[features].t(), bias=bias, lora_x=lora_x, lora_b=lora_b, scale=scale)

    def matmul_t(
        self, grad: Tensor, *, features: slice = ALL, lora_x: Tensor | None = None, lora_b: Tensor | None = None
    ) -> Tensor:
        """grad W + lora_x lora_b, (N, out) -> (N, in), without a gradient: the gradient of the input of `matmul`.

        Args:
            grad: (N, out), of the output features alone that are given.
            features: of the output.
            lora_x, lora_b: (N, r) and (r, in), a low-rank update; both or neither.
        """
        return frozen_matmul(grad, self.weight[features], lora_x=lora_x, lora_b=lora_b)

    def rows(self, index: slice | Tensor) -> Tensor:
        """(n, in): the weights of some output features, in the dtype of the layer."""
        return self.weight[index]


class _FrozenLinearFn(torch.autograd.Function):
    """x W^T + bias and its gradient with respect to x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return layer.matmul(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        return ctx.layer.matmul_t(grad) if ctx.needs_input_grad[0] else None, None


def frozen_matmul(
    x: Tensor,
    matrix: Tensor,
    *,
    bias: Tensor | None = None,
    lora_x: Tensor | None = None,
    lora_b: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """x matrix + bias + scale lora_x lora_b, (N, K) -> (N, M), in the dtype of x, without a gradient.

    Args:
        x: (N, K).
        matrix: (K, M), in the dtype of x, in bfloat16 or in float16.
        bias: (M,).
        lora_x, lora_b: (N, r) and (r, M), a low-rank update; both or neither.
        scale: of the update.
    """
    dtype = matmul_dtype(x)
    if dtype == matrix.dtype:
        out = x @ matrix if bias is None else torch.addmm(bias, x, matrix)
        return out if lora_x is None or lora_b is None else out.addmm_(lora_x.to(dtype), lora_b.to(dtype), alpha=scale)
    num_in, num_out = matrix.shape
    # Chunks run along the longer side, so that the other operand is small and is read again from a cache.
    width = max(1, CHUNK_NUMEL // max(len(x), min(num_in, num_out)))
    chunks = [slice(start, start + width) for start in range(0, max(num_in, num_out), width)]
    if num_in <= num_out:
        out, x_acc = x.new_empty(len(x), num_out), x.to(dtype)
        for chunk in chunks:
            acc = x_acc @ matrix[:, chunk].to(dtype)
            out[:, chunk] = _add_bias_and_lora(acc, chunk, bias, lora_x, lora_b, scale)
        return out
    acc = x.new_zeros(len(x), num_out, dtype=dtype)
    for chunk in chunks:
        acc.addmm_(x[:, chunk].to(dtype), matrix[chunk].to(dtype))
    return _add_bias_and_lora(acc, slice(None), bias, lora_x, lora_b, scale).to(x.dtype)


def _add_bias_and_lora(
    acc: Tensor, columns: slice, bias: Tensor | None, lora_x: Tensor | None, lora_b: Tensor | None, scale: float
) -> Tensor:
    """Add the bias and the low-rank update of some columns to their sums, in place."""
    if bias is not None:
        acc.add_(bias[columns])
    if lora_x is not None and lora_b is not None:
        acc.addmm_(lora_x.to(acc.dtype), lora_b[:, columns].to(acc.dtype), alpha=scale)
    return acc


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which x, (N, ...), is multiplied: its own, or float32 where the CPU multiplies that faster."""
    if x.dtype == torch.float16 and x.device.type == "cpu":
        return torch.float32
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or len(x) < EMULATION_MIN_ROWS:
        return x.dtype
    return torch.float32 if emulates_bf16() else x.dtype


@functools.cache
def emulates_bf16() -> bool:
    """Whether bfloat16 weights are multiplied in float32, because this machine's CPU does that faster."""
    return not has_fast_bf16(torch.device("cpu"))[0]
