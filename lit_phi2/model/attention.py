"""Attention inside packed rows: every example attends to itself only, causally.

    Wqkv's output (N, 3, H, d) -> rotary on q and k -> example by example: softmax(q k^T) v -> (N, H, d)

    N  tokens of all rows of a batch, one after the other      H  heads      d  width of a head

On a CPU plain batched matmuls over one example are faster than the flash kernel, whose backward pass at 512 tokens
costs more than any other matmul of the layer. On CUDA one call of the variable-length flash kernel covers the batch,
where the card has that kernel: from sm80 on.

Scores q k^T of Phi-2 exceed float16, whose largest number is 65,504, before they are scaled (transformers#28673). They
are float32 everywhere: the CPU's products are (`linear.matmul_dtype`), torch's kernels for CPU and CUDA keep them so,
and on MPS queries and keys are converted first (`attend`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812  the name that torch's own documentation uses
from torch.nn.attention.varlen import varlen_attn

from lit_phi2.model.device import has_flash_attention
from lit_phi2.model.linear import matmul_dtype
from lit_phi2.types import Segment, find_segments, to_device

QUERY_BLOCK = 256  # queries whose scores are in memory at the same time: memory stays linear in the length


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Where the examples of a batch begin and end; computed once, used by every layer.

    Attributes:
        segments: of the examples; they cover the N tokens.
        cu_seqlens: (examples + 1,) int32 on CUDA from sm80 on, 0 and the end of each example; else None.
        attn_mask: (B, 1, T, T) bool on MPS, which keys each query attends to; else None.
    """

    segments: list[Segment]
    cu_seqlens: Tensor | None = None
    attn_mask: Tensor | None = None


def packed_layout(position_ids: Tensor, segments: list[Segment] | None = None) -> PackedLayout:
    """Lay out the examples of a batch for the attention of its device.

    Args:
        position_ids: (B, T), 0 where an example begins.
        segments: of the examples; None finds them, for which a GPU has to finish first.

    >>> packed_layout(torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]])).segments
    [(0, 3), (3, 5), (5, 7), (7, 8), (8, 9), (9, 10)]
    """
    segments = find_segments(position_ids) if segments is None else segments
    if position_ids.device.type == "cuda" and has_flash_attention(position_ids.device):
        cu_seqlens = torch.tensor([0, *(end for _, end in segments)], dtype=torch.int32)
        return PackedLayout(segments, to_device(cu_seqlens, position_ids.device))
    if position_ids.device.type == "mps":
        return PackedLayout(segments, attn_mask=block_causal_mask(position_ids))
    return PackedLayout(segments)


def block_causal_mask(position_ids: Tensor) -> Tensor:
    """(B, 1, T, T) bool: the key belongs to the query's example and is not after the query."""
    example = (position_ids == 0).cumsum(1)
    token = torch.arange(position_ids.shape[1], device=position_ids.device)
    mask = (example[:, :, None] == example[:, None, :]) & (token[:, None] >= token)
    return mask[:, None]


def packed_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    layout: PackedLayout,
    *,
    scaling: float,
    dropout: float = 0.0,
    rotate_qkv: Callable[..., tuple[Tensor, ...]] | None = None,
) -> Tensor:
    """Causal attention of every example to itself.

    Args:
        qkv: (N, 3, H, d), before rotary.
        cos, sin: (N, R / 2), of each token's position, for the first R of the d elements of queries and keys.
        layout: of the N tokens.
        scaling: of the scores.
        dropout: of the attention probabilities.
        rotate_qkv: in the place of RotateQkv, where that is used.

    Returns:
        (N, H, d).
    """
    if qkv.device.type == "cpu" and layout.attn_mask is None and not dropout:
        attn_out: Tensor = _PackedAttentionCPU.apply(qkv, cos, sin, layout.segments, scaling)
        return attn_out
    query, key, value = (rotate_qkv or RotateQkv.apply)(qkv, cos, sin)
    if layout.attn_mask is not None:  # all shapes depend on (B, T) only: MPS keeps memory for every new shape
        return _masked_attention(query, key, value, layout.attn_mask, scaling, dropout)
    if layout.cu_seqlens is not None and not dropout and qkv.dtype in (torch.bfloat16, torch.float16):
        max_len = max(end - start for start, end in layout.segments)
        cu_seqlens = layout.cu_seqlens
        output = varlen_attn(
            query, key, value, cu_seqlens, cu_seqlens, max_len, max_len, scale=scaling, window_size=(-1, 0)
        )
        assert isinstance(output, Tensor)
        return output
    outputs = []
    for start, end in layout.segments:
        q, k, v = (tensor[start:end].transpose(0, 1) for tensor in (query, key, value))
        output = attend(q, k, v, is_causal=True, dropout_p=dropout, scale=scaling)
        outputs.append(output.transpose(0, 1))
    return torch.cat(outputs)


def _masked_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, scaling: float, dropout: float
) -> Tensor:
    """(N, H, d), over whole rows with a mask."""
    # (B, H, T, d)
    query, key, value = (x.unflatten(0, (len(attn_mask), -1)).transpose(1, 2) for x in (query, key, value))
    output = attend(query, key, value, attn_mask=attn_mask, dropout_p=dropout, scale=scaling)
    return output.transpose(1, 2).flatten(0, 1)


def attend(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
    """torch's scaled_dot_product_attention, with float32 scores on MPS too, where float16's would overflow."""
    dtype = query.dtype
    if dtype == torch.float16 and query.device.type == "mps":
        query, key, value = query.float(), key.float(), value.float()
    return F.scaled_dot_product_attention(query, key, value, **settings).to(dtype)


def apply_rotary_emb(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864) of the first R elements of (N, ..., d).

    Element i of the first R / 2 and element i of the second R / 2 form a pair.
    """
    half = cos.shape[-1]
    broadcast = (len(cos), *[1] * (heads.ndim - 2), half)
    cos, sin = cos.view(broadcast), sin.view(broadcast)
    first, second, rest = heads.split([half, half, heads.shape[-1] - 2 * half], -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


class RotateQkv(torch.autograd.Function):
    """(N, 3, H, d) -> queries and keys with the rotary embedding, and values, (N, H, d) each, in memory of their own.

    The result is all that backward needs, so qkv is not kept. Autograd's own backward of slices would write a tensor of
    zeros of the size of qkv for each of them, and add these.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        rotated = qkv.clone()
        apply_rotary_emb_(rotated[:, :2], cos[:, None, None], sin[:, None, None])
        return rotated.unbind(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        grad_qkv = torch.stack(grads, 1)
        # The transpose of a rotation turns back.
        apply_rotary_emb_(grad_qkv[:, :2], cos[:, None, None], -sin[:, None, None])
        return grad_qkv, None, None


class _PackedAttentionCPU(torch.autograd.Function):
    """On the CPU: rotary and attention as batched matmuls; probabilities are recomputed in backward, not saved.

    Queries, keys and values of an example are contiguous, (3, H, n, d): a batched matmul copies what is not.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, segments: list[Segment], scaling: float) -> Tensor:
        qkv_rotated, dtype = qkv.new_empty(qkv.numel()), matmul_dtype(qkv)
        attn_out = torch.empty_like(qkv[:, 0])
        for start, end in segments:
            segment_qkv = _segment_view(qkv_rotated, start, end, qkv.shape)
            segment_qkv.copy_(qkv[start:end].permute(1, 2, 0, 3))
            apply_rotary_emb_(segment_qkv[:2], cos[start:end], sin[start:end])
            query, key, value = segment_qkv.to(dtype)
            for first in range(0, end - start, QUERY_BLOCK):
                last = min(first + QUERY_BLOCK, end - start)
                probs = _attn_probs(query[:, first:last], key[:, :last], scaling)
                attn_out[start + first : start + last] = torch.bmm(probs, value[:, :last]).transpose(0, 1)
        ctx.save_for_backward(qkv_rotated, cos, sin)
        ctx.segments, ctx.scaling, ctx.shape = segments, scaling, qkv.shape
        return attn_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        qkv_rotated, cos, sin = ctx.saved_tensors
        grad_qkv, dtype = grad.new_empty(ctx.shape), matmul_dtype(grad)
        cos, sin = cos.to(dtype), sin.to(dtype)
        for start, end in ctx.segments:
            segment_qkv = _segment_view(qkv_rotated, start, end, ctx.shape).to(dtype)
            grad_segment = _segment_backward(segment_qkv, grad[start:end], ctx.scaling)
            apply_rotary_emb_(grad_segment[:2], cos[start:end], -sin[start:end])
            grad_qkv[start:end] = grad_segment.permute(2, 0, 1, 3)
        return grad_qkv, None, None, None, None


def _segment_backward(segment_qkv: Tensor, grad: Tensor, scaling: float) -> Tensor:
    """(3, H, n, d): the gradient of an example's rotated queries and keys and of its values.

    Args:
        segment_qkv: (3, H, n, d).
        grad: (n, H, d), of the output.
        scaling: of the scores.
    """
    query, key, value = segment_qkv
    grad_attn_out = torch.empty_like(query).copy_(grad.transpose(0, 1))  # (H, n, d)
    grad_segment = grad_attn_out.new_empty(3, *grad_attn_out.shape)
    length = query.shape[1]
    # From the last block, whose queries attend to all keys of the example: it fills what the others add to.
    for first in reversed(range(0, length, QUERY_BLOCK)):
        last = min(first + QUERY_BLOCK, length)
        query_block, visible = slice(first, last), slice(0, last)
        probs = _attn_probs(query[:, query_block], key[:, visible], scaling)
        grad_probs = torch.bmm(grad_attn_out[:, query_block], value[:, visible].transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
        grad_segment[0, :, query_block] = torch.bmm(grad_scores, key[:, visible]).mul_(scaling)
        grad_key = torch.bmm(grad_scores.transpose(1, 2), query[:, query_block]).mul_(scaling)
        grad_value = torch.bmm(probs.transpose(1, 2), grad_attn_out[:, query_block])
        if last == length:
            grad_segment[1], grad_segment[2] = grad_key, grad_value
        else:
            grad_segment[1, :, visible] += grad_key
            grad_segment[2, :, visible] += grad_value
    return grad_segment


def _segment_view(qkv_rotated: Tensor, start: int, end: int, shape: torch.Size) -> Tensor:
    """(3, H, n, d): queries, keys and values of an example, in the memory that its tokens have in (N, 3, H, d)."""
    _, three, heads, width = shape
    numel = three * heads * width
    return qkv_rotated[start * numel : end * numel].view(three, heads, end - start, width)


def _attn_probs(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """(H, queries, keys): softmax of the scores, where the last query attends to all keys."""
    num_queries, num_keys = query.shape[1], key.shape[1]
    future = torch.full((num_queries, num_keys), float("-inf"), dtype=query.dtype).triu_(num_keys - num_queries + 1)
    return torch.baddbmm(future, query, key.transpose(1, 2), alpha=scaling).softmax(-1)


def apply_rotary_emb_(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """apply_rotary_emb in place; cos and sin have the shape of the first R / 2 elements, or are broadcast to it."""
    half = cos.shape[-1]
    first, second = heads[..., :half], heads[..., half : 2 * half]
    first_rotated = first * cos - second * sin
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(first_rotated)
