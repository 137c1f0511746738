"""Fusion: the elementwise operations between the matrix products of a block, each compiled into one kernel.

    qkv (N, 3, H, d) -> rotary of queries and keys -> q, k, v          8 kernels of torch, or 1
    hidden + dropout(attn_output) + dropout(mlp_output)                4 kernels of torch, or 1

Backward as many again. GELU and the norms are one kernel in torch, too, so they are left to it, and so are the products
with their LoRA, whose autograd functions say what is saved: the memory plan holds with both. Nothing here depends on
the number of tokens, which is dynamic, so each function is compiled once.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  the name that torch's own documentation uses

from lit_phi2.model.attention import RotateQkv, apply_rotary_emb
from lit_phi2.model.kernels import dropout_add_residual


class BlockOps(NamedTuple):
    """The operations that a block calls.

    Attributes:
        rotate_qkv: qkv, cos, sin -> queries and keys with the rotary embedding, and values, in memory of their own.
        add_residual: hidden, attn_output, mlp_output, dropout -> their sum.
    """

    rotate_qkv: Callable[..., tuple[Tensor, ...]]
    add_residual: Callable[..., Tensor]


EAGER = BlockOps(RotateQkv.apply, dropout_add_residual)


@functools.cache
def compile_ops(backend: str | Callable[..., Any] = "inductor") -> BlockOps:
    """Operations that are compiled at their first call, which raises what the compiler raises."""
    compiled = partial(torch.compile, dynamic=True, fullgraph=True, backend=backend)
    return BlockOps(compiled(rotate_qkv), compiled(add_residual))


def rotate_qkv(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """RotateQkv as operations that a compiler knows."""
    query, key = apply_rotary_emb(qkv[:, :2], cos, sin).unbind(1)
    return query, key, qkv[:, 2].clone()


def add_residual(hidden: Tensor, attn_output: Tensor, mlp_output: Tensor, *, dropout: float) -> Tensor:
    """dropout_add_residual as operations that a compiler knows; it draws other numbers from the same generator."""
    return hidden + F.dropout(attn_output, dropout) + F.dropout(mlp_output, dropout)
