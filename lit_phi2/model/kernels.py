"""Kernels: the elementwise operations between the matrix products of a block, in few passes over memory.

    fc1's output (N, F) -> GELU -> (N, F)
    hidden + dropout(attn_output) + dropout(mlp_output), each (N, D) -> (N, D)

On a CPU with AMX a matrix product of Phi-2's width takes some ten milliseconds, and torch's own tanh or dropout over
its output takes as long again. A GPU has kernels for both, which are used there.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812  the name that torch's own documentation uses

CHUNK_NUMEL = 2**17  # elements that GELU processes at a time: a few float32 copies of them fit a core's cache


def gelu(x: Tensor) -> Tensor:
    """GELU by tanh (Hendrycks and Gimpel 2016, arXiv:1606.08415), which transformers calls gelu_new.

    >>> gelu(torch.tensor([1.0], requires_grad=True)).item() == F.gelu(torch.tensor(1.0), approximate="tanh").item()
    True
    """
    if has_gelu_slope(x):
        result: Tensor = _Gelu.apply(x)
        return result
    if x.dtype == torch.float16 and x.device.type == "mps":  # x^3 overflows beyond 40; other devices cube in float32
        return F.gelu(x.float(), approximate="tanh").to(x.dtype)
    return F.gelu(x, approximate="tanh")


def has_gelu_slope(x: Tensor) -> bool:
    """Whether the gradient of gelu(x) is that of `gelu_and_slope`, and not torch's own."""
    return x.device.type == "cpu" and x.requires_grad and torch.is_grad_enabled()


class _Gelu(torch.autograd.Function):
    """Backward needs the slope only, so the slope is saved instead of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        value, slope = gelu_and_slope(x)
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return grad * slope


def gelu_and_slope(x: Tensor, *, only_value: bool = False) -> tuple[Tensor, Tensor]:
    """x sigmoid(2 u) = 0.5 x (1 + tanh u), where u = sqrt(2 / pi) (x + 0.044715 x^3), and its derivative.

    A sigmoid costs a third of a tanh, and the same sigmoid gives value and slope.

    Args:
        x: any shape.
        only_value: leave the slope without elements.
    """
    flat, acc_dtype = x.reshape(-1), torch.promote_types(x.dtype, torch.float32)
    value, slope = torch.empty_like(flat), flat.new_empty(0 if only_value else len(flat))
    linear = torch.tensor(2 * math.sqrt(2 / math.pi), dtype=acc_dtype)
    cubic = 0.044715 * linear.item()
    for start in range(0, len(flat), CHUNK_NUMEL):
        chunk = slice(start, start + CHUNK_NUMEL)
        x_chunk = flat[chunk].to(acc_dtype)
        gate = torch.addcmul(linear, x_chunk, x_chunk, value=cubic).mul_(x_chunk).sigmoid_()
        product = x_chunk * gate
        value[chunk] = product
        if not only_value:  # the slope is gate + x gate (1 - gate) (2 u)'
            gate_slope = torch.addcmul(product, product, gate, value=-1)
            slope[chunk] = torch.addcmul(linear, x_chunk, x_chunk, value=3 * cubic).mul_(gate_slope).add_(gate)
    return value.view_as(x), slope if only_value else slope.view_as(x)


def dropout_add_residual(hidden: Tensor, attn_output: Tensor, mlp_output: Tensor, *, dropout: float) -> Tensor:
    """hidden + dropout(attn_output) + dropout(mlp_output), drawn from torch's default generator.

    Args:
        hidden, attn_output, mlp_output: tensors of one shape.
        dropout: the fraction that is dropped; on a CPU it is rounded to a multiple of 1 / 65,536.
    """
    drop_per_65536 = round(dropout * 2**16)
    if drop_per_65536 and hidden.device.type == "cpu":
        seeds = dropout_seed(), dropout_seed()
        total: Tensor = _DropoutAddResidual.apply(hidden, attn_output, mlp_output, seeds, drop_per_65536)
        return total
    return F.dropout(attn_output, dropout).add_(F.dropout(mlp_output, dropout)).add_(hidden)


def dropout_seed() -> int:
    """A seed of `dropout_mask`, from torch's default generator."""
    return int(torch.randint(2**63 - 1, ()))


def dropout_mask(like: Tensor, drop_per_65536: int, seed: int) -> Tensor:
    """int8 mask in the shape of `like`: 1 where dropout keeps an element, 0 where it drops one.

    Each 64-bit number gives four elements. The numbers come from a small fast generator: torch itself draws one number
    after another on a CPU, which would take longer than everything else between two matrix products. int8, because
    torch converts it five times as fast as bool.

    Args:
        like: gives the shape.
        drop_per_65536: how many of 65,536 elements are dropped on average.
        seed: from `dropout_seed`.
    """
    numbers = np.random.SFC64(seed).random_raw(-(-like.numel() // 4))
    draws = torch.from_numpy(numbers.view(np.int16))[: like.numel()].view(like.shape)
    return draws.ge_(drop_per_65536 - 2**15).to(torch.int8)


class _DropoutAddResidual(torch.autograd.Function):
    """hidden + scale attn_mask attn_output + scale mlp_mask mlp_output; backward draws the masks again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, attn_output: Tensor, mlp_output: Tensor, seeds: tuple[int, int], drop_per_65536: int
    ) -> Tensor:
        ctx.seeds, ctx.drop_per_65536, scale = seeds, drop_per_65536, _dropout_scale(drop_per_65536)
        attn_mask, mlp_mask = (dropout_mask(hidden, drop_per_65536, seed).to(hidden.dtype) for seed in seeds)
        total = torch.addcmul(hidden, attn_output, attn_mask, value=scale)
        return total.addcmul_(mlp_output, mlp_mask, value=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled_grad = grad * _dropout_scale(ctx.drop_per_65536)
        masks = (dropout_mask(grad, ctx.drop_per_65536, seed) for seed in ctx.seeds)
        grad_attn, grad_mlp = (mask.to(grad.dtype).mul_(scaled_grad) for mask in masks)
        return grad, grad_attn, grad_mlp, None, None


def _dropout_scale(drop_per_65536: int) -> float:
    """What keeps the mean."""
    return 2**16 / (2**16 - drop_per_65536)
