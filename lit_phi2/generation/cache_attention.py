"""Cache attention: the new tokens of a pass attend to their slots.

    (N, 3, H, d) of all new tokens -> rotary -> keys and values into the cache
      slots 0 1 2 3 | 4 | 5 6 7   groups: neighbours with one new token each, whose lengths are alike  -> one call each
      -> (N, H, d)

What a token gets depends on its own slot alone, to the bit: neighbours decide only which calls are made together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_phi2.generation.kv_cache import CacheShape, KVCache, round_up
from lit_phi2.model.attention import attend

MASK_STEP = 32  # positions; the length of masked attention is a multiple of it
CALL_BYTES = 1_000_000  # of keys and values that are read in the time that a call costs by itself, about 40 us


@dataclass(frozen=True, slots=True)
class Segment:
    """New tokens of a slot.

    Attributes:
        slot: index.
        start, end: position of the first new token, and the one after the last.
        prefix_slot: holds the same tokens before start, and is copied from first; None where the slot has them.
    """

    slot: int
    start: int
    end: int
    prefix_slot: int | None = None


class CacheAttention:
    """Attention of a pass: (N, 3, H, d) before rotary -> (N, H, d), in the layer that is set.

    Args:
        cache: takes the keys and values of the new tokens.
        segments: the new tokens.
        num_padding: tokens after those of the segments, which have no slot.
        cos, sin: of every position, as `apply_rotary_emb_` takes them.
        scaling: of the scores.
    """

    def __init__(
        self, cache: KVCache, segments: Sequence[Segment], num_padding: int, cos: Tensor, sin: Tensor, scaling: float
    ) -> None:
        self.layer = 0
        self.cache, self.num_padding, self.scaling = cache, num_padding, scaling
        slots: list[int] = []
        positions: list[int] = []
        for segment in segments:
            slots += [segment.slot] * (segment.end - segment.start)
            positions += range(segment.start, segment.end)
        self.num_tokens = len(slots)
        self.slots, self.positions = torch.tensor([slots, positions], device=cos.device).unbind(0)
        self.cos, self.sin = cos[self.positions], sin[self.positions]
        self.groups = group_segments(segments, cache.shape)
        self.masks = [_mask(group, cache.shape, cos.device) for group in self.groups]

    def __call__(self, qkv: Tensor) -> Tensor:
        dtype, qkv = qkv.dtype, qkv[: self.num_tokens]
        apply_rotary_emb_(qkv[:, :2], self.cos, self.sin)
        qkv = qkv.to(self.cache.shape.dtype)
        self.cache.write(self.layer, self.slots, self.positions, qkv[:, 1:])
        outputs, first = [], 0
        for group, mask in zip(self.groups, self.masks, strict=True):
            num_tokens = sum(segment.end - segment.start for segment in group)
            outputs.append(self._attend(group, qkv[first : first + num_tokens, 0], mask))
            first += num_tokens
        if self.num_padding:
            outputs.append(outputs[0].new_zeros(self.num_padding, *outputs[0].shape[1:]))
        return torch.cat(outputs).to(dtype)

    def _attend(self, group: Sequence[Segment], query: Tensor, mask: Tensor | None) -> Tensor:
        """(N, H, d): the new tokens of a group, each over its slot."""
        segment = group[0]
        if segment.prefix_slot is not None:
            self.cache.copy_prefix(self.layer, segment.prefix_slot, segment.slot, segment.start)
        length = segment.end if mask is None else mask.shape[-1]
        keys, values = self.cache.layers[self.layer][:, segment.slot : segment.slot + len(group), :, :length]
        query = query.unflatten(0, (len(group), -1)).transpose(1, 2)  # (S, H, new tokens of each, d)
        if mask is not None and mask.dim() == 3:
            output = _attend_single(query.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1), mask, self.scaling)
            return output.view(len(group), -1, query.shape[-1])
        output = attend(query, keys, values, attn_mask=mask, is_causal=mask is None, scale=self.scaling)
        return output.transpose(1, 2).flatten(0, 1)


def _attend_single(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """(S H, 1, d): one new token of each slot in float32 on a CPU: batched products take less time than a fused kernel.

    Args:
        query: (S H, 1, d).
        keys, values: (S H, C, d).
        mask: (S H, 1, C).
        scaling: of the scores.
    """
    scores = torch.baddbmm(mask, query, keys.transpose(1, 2), alpha=scaling)
    return torch.bmm(scores.softmax(-1), values)


def group_segments(segments: Sequence[Segment], shape: CacheShape) -> list[list[Segment]]:
    """Segments whose attention is one call: single tokens of neighbouring slots, all over the positions of the longest.

    Among the ways to cut neighbours into calls, the one that reads least, with CALL_BYTES for each call.
    """
    groups: list[list[Segment]] = []
    run: list[Segment] = []  # of neighbours
    for segment in segments:
        is_single = segment.end - segment.start == 1 and segment.prefix_slot is None
        if run and not (is_single and run[-1].slot + 1 == segment.slot):
            groups += _cut(run, shape)
            run = []
        if is_single:
            run.append(segment)
        else:
            groups.append([segment])
    return groups + _cut(run, shape)


def _cut(run: list[Segment], shape: CacheShape) -> list[list[Segment]]:
    position_bytes = 2 * shape.num_heads * shape.head_dim * shape.dtype.itemsize
    lengths = [round_up(segment.end, MASK_STEP) for segment in run]
    best = [(0, 0)]  # of the first 0, 1, 2, ... segments: bytes, and where the last call begins
    for end in range(1, len(run) + 1):
        longest = 0
        options = []
        for start in range(end - 1, -1, -1):
            longest = max(longest, lengths[start])
            options.append((best[start][0] + CALL_BYTES + longest * (end - start) * position_bytes, start))
        best.append(min(options))
    groups = []
    end = len(run)
    while end:
        start = best[end][1]
        groups.append(run[start:end])
        end = start
    return groups[::-1]


def _mask(group: Sequence[Segment], shape: CacheShape, device: torch.device) -> Tensor | None:
    """0 where a token attends and -inf elsewhere; None for a whole prompt.

    A sum over more positions than a token has, up to a multiple of MASK_STEP, is the same to the bit: what a mask hides
    adds zeros at its end.

    Returns:
        (S, 1, new tokens of each, positions); for `_attend_single` (S H, 1, positions).
    """
    num_tokens, length = group[0].end - group[0].start, round_up(max(segment.end for segment in group), MASK_STEP)
    if group[0].start == 0 and num_tokens > 1:
        return None
    last = torch.tensor([range(segment.start, segment.end) for segment in group], device=device)
    hidden = torch.arange(length, device=device) > last.view(len(group), 1, num_tokens, 1)
    mask = torch.zeros(hidden.shape, dtype=shape.dtype, device=device).masked_fill_(hidden, -torch.inf)
    is_batched = num_tokens == 1 and shape.dtype == torch.float32 and device.type == "cpu"
    return mask.expand(-1, shape.num_heads, -1, -1).flatten(0, 1) if is_batched else mask


def apply_rotary_emb_(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864) of the first R elements of (N, 2, H, d), in place.

    Args:
        heads: queries and keys.
        cos, sin: (N, 1, 1, 2, R / 2), of each token's position; sin with the sign that each half takes it with.
    """
    half = cos.shape[-1]
    pairs = heads[..., : 2 * half].unflatten(-1, (2, half))
    swapped = pairs.flip(-2).mul_(sin)
    pairs.mul_(cos).add_(swapped)
