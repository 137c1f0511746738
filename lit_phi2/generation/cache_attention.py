"""Cache attention: the new tokens of a pass attend to their slots.

    (N, 3, H, d) of all new tokens -> rotary -> keys and values into the cache
      slots 0 1 2 3 | 4 | 5 6 7   groups: neighbours with few new tokens each, whose lengths are alike  -> one call each
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
MIN_QUERIES = 4  # of a slot in a batched product: with more, one gets the same bits (fewer take another kernel)
CALL_BYTES = 1_000_000  # of keys and values that are read in the time that a call costs by itself, about 40 us


@dataclass(frozen=True, slots=True)
class Segment:
    """New tokens of a slot.

    Attributes:
        slot: index.
        start, end: position of the first new token, and the one after the last.
        prefix_slot: holds the same tokens before start, and is copied from first; None where the slot has them.
        is_prompt: they belong to a prompt, not to its completion.
    """

    slot: int
    start: int
    end: int
    prefix_slot: int | None = None
    is_prompt: bool = False


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
        self.groups = [Group(segments, cache.shape, cos.device) for segments in group_segments(segments, cache.shape)]

    def __call__(self, qkv: Tensor) -> Tensor:
        dtype, qkv = qkv.dtype, qkv[: self.num_tokens]
        apply_rotary_emb_(qkv[:, :2], self.cos, self.sin)
        qkv = qkv.to(self.cache.shape.dtype)
        self.cache.write(self.layer, self.slots, self.positions, qkv[:, 1:])
        outputs, first = [], 0
        for group in self.groups:
            outputs.append(self._attend(group, qkv[first : first + group.num_tokens, 0]))
            first += group.num_tokens
        if self.num_padding:
            outputs.append(outputs[0].new_zeros(self.num_padding, *outputs[0].shape[1:]))
        return torch.cat(outputs).to(dtype)

    def _attend(self, group: "Group", query: Tensor) -> Tensor:
        """(N, H, d): the new tokens of a group, each over its slot."""
        segment, num_slots = group.segments[0], len(group.segments)
        if segment.prefix_slot is not None:
            self.cache.copy_prefix(self.layer, segment.prefix_slot, segment.slot, segment.start)
        keys, values = self.cache.layers[self.layer][:, segment.slot : segment.slot + num_slots, :, : group.length]
        if group.rows is not None:
            query = query[group.rows]
        query = query.unflatten(0, (num_slots, -1)).transpose(1, 2)  # (S, H, Q, d)
        if group.is_batched:
            assert group.mask is not None
            query, keys, values = query.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1)
            output = _attend_few(query, keys, values, group.mask, self.scaling).unflatten(0, (num_slots, -1))
        else:
            output = attend(query, keys, values, attn_mask=group.mask, is_causal=group.mask is None, scale=self.scaling)
        output = output.transpose(1, 2).flatten(0, 1)
        return output if group.places is None else output[group.places]


def _attend_few(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """(S H, Q, d): few new tokens of each slot in float32 on a CPU, where products take less time than a fused kernel.

    Args:
        query: (S H, Q, d).
        keys, values: (S H, C, d).
        mask: (S H, Q, C).
        scaling: of the scores.
    """
    scores = torch.baddbmm(mask, query, keys.transpose(1, 2), alpha=scaling)
    return torch.bmm(scores.softmax(-1), values)


class Group:
    """Segments whose attention is one call: a prompt, or few new tokens each of neighbouring slots.

    Args:
        segments: of neighbouring slots; all shorter than the longest are padded with their first token.
        shape: of the cache.
        device: of the cache.

    Attributes:
        num_tokens: new tokens, without the padding.
        length: C, positions that the call reads of each slot.
        is_batched: the call is two batched products, of at least MIN_QUERIES tokens of each slot.
        rows: (S Q,) which of the new tokens the call computes; None for all in their order.
        places: (num_tokens,) where they are in its output; None as in rows.
        mask: 0 where a token attends and -inf elsewhere, (S, 1, Q, C), (S H, Q, C) if is_batched; None for a whole
            prompt. A sum over more positions than a token has, up to a multiple of MASK_STEP, is the same to the bit:
            what a mask hides adds zeros at its end.
    """

    def __init__(self, segments: Sequence[Segment], shape: CacheShape, device: torch.device) -> None:
        self.segments = segments
        counts = [segment.end - segment.start for segment in segments]
        self.num_tokens, self.length = sum(counts), max(segment.end for segment in segments)
        self.is_batched = not segments[0].is_prompt and shape.dtype == torch.float32 and device.type == "cpu"
        self.rows = self.places = self.mask = None
        if segments[0].is_prompt and segments[0].start == 0:
            return
        self.length = round_up(self.length, MASK_STEP)
        num_queries = max(*counts, MIN_QUERIES if self.is_batched else 1)
        rows: list[int] = []
        places: list[int] = []
        positions: list[list[int]] = []
        for slot, (segment, count) in enumerate(zip(segments, counts, strict=True)):
            padding = [0] * (num_queries - count)
            rows += [len(places) + place for place in (*range(count), *padding)]
            positions.append([segment.start + place for place in (*range(count), *padding)])
            places += range(slot * num_queries, slot * num_queries + count)
        if len(rows) > len(places):
            self.rows, self.places = torch.tensor(rows, device=device), torch.tensor(places, device=device)
        hidden = torch.arange(self.length, device=device) > torch.tensor(positions, device=device)[:, None, :, None]
        mask = torch.zeros(hidden.shape, dtype=shape.dtype, device=device).masked_fill_(hidden, -torch.inf)
        self.mask = mask.expand(-1, shape.num_heads, -1, -1).flatten(0, 1) if self.is_batched else mask


def group_segments(segments: Sequence[Segment], shape: CacheShape) -> list[list[Segment]]:
    """Segments whose attention is one call: few tokens of neighbouring slots, all over the positions of the longest.

    Among the ways to cut neighbours into calls, the one that reads least, with CALL_BYTES for each call.
    """
    groups: list[list[Segment]] = []
    run: list[Segment] = []  # of neighbours
    for segment in segments:
        if run and (segment.is_prompt or run[-1].slot + 1 != segment.slot):
            groups += _cut(run, shape)
            run = []
        if segment.is_prompt:
            groups.append([segment])
        else:
            run.append(segment)
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
