"""Attention inside packed rows: every example attends to itself alone, causally.

    Wqkv's output (N, 3, H, d) -> rotary on q and k -> example by example: softmax(q k^T) v -> (N, H, d)

    N  tokens of all rows of a batch, one after the other      H  heads      d  width of a head

Plain batched products over one example are faster on a CPU than its flash kernel, whose backward at 512 tokens costs
more than any product of the layer. On CUDA one call of the variable-length flash kernel does the whole batch.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812  the name that torch's own documentation uses
from torch.nn.attention.varlen import varlen_attn

from lit_phi2.model.linear import matmul_dtype

Span = tuple[int, int]  # where an example begins and ends among the N tokens
QUERY_BLOCK = 256  # rows of scores that are held at a time: memory for them is linear in the length of an example


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Where the examples of a batch lie; made once, used by every layer.

    Attributes:
        spans: of the examples; they cover the N tokens.
        ends: (examples + 1,) int32 on CUDA, 0 and where each example ends; else None.
        seen: (B, 1, T, T) bool on MPS, which key each query attends to; else None.
    """

    spans: list[Span]
    ends: Tensor | None = None
    seen: Tensor | None = None


def packed_layout(position_ids: Tensor) -> PackedLayout:
    """Where the examples of a batch begin and end.

    Args:
        position_ids: (B, T), 0 where an example begins.

    >>> packed_layout(torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]])).spans
    [(0, 3), (3, 5), (5, 7), (7, 8), (8, 9), (9, 10)]
    """
    flat = position_ids.flatten()
    starts = torch.nonzero(flat == 0).flatten().tolist()
    spans = list(zip(starts, [*starts[1:], len(flat)], strict=True))
    if position_ids.device.type == "cuda":
        ends = torch.tensor([0, *(end for _, end in spans)], dtype=torch.int32, device=position_ids.device)
        return PackedLayout(spans, ends=ends)
    if position_ids.device.type == "mps":
        return PackedLayout(spans, seen=block_causal_mask(position_ids))
    return PackedLayout(spans)


def block_causal_mask(position_ids: Tensor) -> Tensor:
    """(B, 1, T, T): whether a key is of the same example as the query, and not after it."""
    example = (position_ids == 0).cumsum(1)
    place = torch.arange(position_ids.shape[1], device=position_ids.device)
    seen = (example[:, :, None] == example[:, None, :]) & (place[:, None] >= place)
    return seen[:, None]


def packed_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, layout: PackedLayout, *, scaling: float, dropout: float = 0.0
) -> Tensor:
    """Causal attention of every example to itself.

    Args:
        qkv: (N, 3, H, d), before rotary.
        cos, sin: (N, R / 2) of each token's position, for the first R of the d elements of queries and keys.
        layout: of the N tokens.
        scaling: of the scores.
        dropout: of the attention weights.

    Returns:
        (N, H, d).
    """
    if qkv.device.type == "cpu" and layout.seen is None and not dropout:
        mixed: Tensor = _PackedAttentionCPU.apply(qkv, cos, sin, layout.spans, scaling)
        return mixed
    query, key = apply_rotary_emb(qkv[:, :2], cos, sin).unbind(1)
    value = qkv[:, 2]
    if layout.seen is not None:  # shapes that depend on the batch's alone: MPS keeps memory for every new shape
        # (B, H, T, d)
        query, key, value = (x.unflatten(0, (len(layout.seen), -1)).transpose(1, 2) for x in (query, key, value))
        masked = F.scaled_dot_product_attention(
            query, key, value, attn_mask=layout.seen, dropout_p=dropout, scale=scaling
        )
        return masked.transpose(1, 2).flatten(0, 1)
    if layout.ends is not None and not dropout and qkv.dtype in (torch.bfloat16, torch.float16):
        longest = max(end - start for start, end in layout.spans)
        output = varlen_attn(
            query, key, value, layout.ends, layout.ends, longest, longest, scale=scaling, window_size=(-1, 0)
        )
        assert isinstance(output, Tensor)
        return output
    parts = []
    for start, end in layout.spans:
        q, k, v = (tensor[start:end].transpose(0, 1) for tensor in (query, key, value))
        part = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, scale=scaling)
        parts.append(part.transpose(0, 1))
    return torch.cat(parts)


def apply_rotary_emb(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021) of the first R elements of (N, ..., d): pairs of one element of each half."""
    half = cos.shape[-1]
    shape = (len(cos), *[1] * (heads.ndim - 2), half)
    cos, sin = cos.view(shape), sin.view(shape)
    first, second, rest = heads.split([half, half, heads.shape[-1] - 2 * half], -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


class _PackedAttentionCPU(torch.autograd.Function):
    """On the CPU: rotary and attention as batched products; weights are worked out again in backward, not kept.

    Queries, keys and values of an example lie together, (3, H, n, d), because a batched product copies what does not.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, spans: list[Span], scaling: float) -> Tensor:
        turned, dtype = qkv.new_empty(qkv.numel()), matmul_dtype(qkv)
        mixed = torch.empty_like(qkv[:, 0])
        for start, end in spans:
            own = _of_example(turned, start, end, qkv.shape)
            own.copy_(qkv[start:end].permute(1, 2, 0, 3))
            apply_rotary_emb_(own[:2], cos[start:end], sin[start:end])
            query, key, value = own.to(dtype)
            for first in range(0, end - start, QUERY_BLOCK):
                last = min(first + QUERY_BLOCK, end - start)
                weights = _weights(query[:, first:last], key[:, :last], scaling)
                mixed[start + first : start + last] = torch.bmm(weights, value[:, :last]).transpose(0, 1)
        ctx.save_for_backward(turned, cos, sin)
        ctx.spans, ctx.scaling, ctx.shape = spans, scaling, qkv.shape
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        turned, cos, sin = ctx.saved_tensors
        grads, dtype = grad.new_empty(ctx.shape), matmul_dtype(grad)
        cos, sin = cos.to(dtype), sin.to(dtype)
        for start, end in ctx.spans:
            query, key, value = _of_example(turned, start, end, ctx.shape).to(dtype)
            of_mixed = torch.empty_like(query).copy_(grad[start:end].transpose(0, 1))  # (H, n, d)
            own = of_mixed.new_empty(3, *of_mixed.shape)
            for first in reversed(range(0, end - start, QUERY_BLOCK)):
                last = min(first + QUERY_BLOCK, end - start)
                some, seen = slice(first, last), slice(0, last)
                weights = _weights(query[:, some], key[:, seen], ctx.scaling)
                grad_weights = torch.bmm(of_mixed[:, some], value[:, seen].transpose(1, 2))
                grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
                own[0, :, some] = torch.bmm(grad_scores, key[:, seen]).mul_(ctx.scaling)
                parts = (
                    torch.bmm(grad_scores.transpose(1, 2), query[:, some]).mul_(ctx.scaling),
                    torch.bmm(weights.transpose(1, 2), of_mixed[:, some]),
                )
                for row, part in enumerate(parts, 1):
                    if last == end - start:  # the last queries see all keys of the example, and come first
                        own[row] = part
                    else:
                        own[row, :, seen] += part
            apply_rotary_emb_(own[:2], cos[start:end], -sin[start:end])
            grads[start:end] = own.permute(2, 0, 1, 3)
        return grads, None, None, None, None


def _of_example(turned: Tensor, start: int, end: int, shape: torch.Size) -> Tensor:
    """(3, H, n, d): queries, keys and values of an example, in the memory of those of (N, 3, H, d)."""
    _, three, heads, width = shape
    each = three * heads * width
    return turned[start * each : end * each].view(three, heads, end - start, width)


def _weights(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """(H, queries, keys): softmax of the scores, where the last query sees all keys."""
    queries, keys = query.shape[1], key.shape[1]
    future = torch.full((queries, keys), float("-inf"), dtype=query.dtype).triu_(keys - queries + 1)
    return torch.baddbmm(future, query, key.transpose(1, 2), alpha=scaling).softmax(-1)


def apply_rotary_emb_(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary embedding of (..., N, d), as rotate does."""
    half = cos.shape[-1]
    first, second = heads[..., :half], heads[..., half : 2 * half]
    turned = first * cos - second * sin
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(turned)
