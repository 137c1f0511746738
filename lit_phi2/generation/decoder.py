"""Decoder: one pass of new tokens through the model, over the cache.

    slot 0, positions 7..8   slot 2, positions 0..41   slot 3, position 19     segments of new tokens, packed
      -> every block: keys and values written into the slots, then each segment attends to its slot up to its own end
      -> hidden states of the tokens asked for -> the most probable next token of each

A decode pass is segments of one token, a prefill segments of whole prompts, a check of drafts segments of a few tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  the name that torch's own documentation uses

from lit_phi2.generation.kv_cache import CacheShape, KVCache, round_up
from lit_phi2.generation.weights import DecodingWeights
from lit_phi2.model.phi2 import FusedPhiForCausalLM, block_forward

MASK_STEP = 16  # positions; the length of masked attention is a multiple of it
CALL_BYTES = 200_000  # of keys and values that are read in the time of another call of attention, about 20 us


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


class Decoder:
    """Passes of a model over a cache.

    Args:
        model: gives the shapes and the rotary embedding.
        weights: of `prepare_weights`.
    """

    def __init__(self, model: FusedPhiForCausalLM, weights: DecodingWeights) -> None:
        self.weights = weights
        self.device = weights.embed.device
        config, attn = model.config, model.model.layers[0].self_attn
        self.cache_shape = CacheShape(
            config.num_hidden_layers, config.num_attention_heads, attn.head_dim, weights.cache_dtype
        )
        self.scaling = float(attn.scaling)
        self.cos, self.sin = _rotary_table(model, weights.dtype)

    @torch.inference_mode()
    def forward(
        self, cache: KVCache, ids: Sequence[int], segments: Sequence[Segment], wanted: Sequence[int] | None = None
    ) -> list[int]:
        """The most probable next token after some of the new tokens.

        Args:
            cache: takes the keys and values of the new tokens.
            ids: of all segments, one after the other.
            segments: no slot twice; a prefix_slot that is itself in segments comes before.
            wanted: after which tokens, as indices into ids; None for all.
        """
        num_padding = max(0, self.weights.min_rows - len(ids))
        tokens = torch.tensor([*ids, *[0] * num_padding], device=self.device)
        hidden = F.embedding(tokens, self.weights.embed).to(self.weights.dtype)
        attention = _CacheAttention(self, cache, segments, num_padding)
        for layer, block in enumerate(self.weights.blocks):
            attention.layer = layer
            hidden = block_forward(block, hidden, attention)
        if wanted is not None:
            rows = [*wanted, *[0] * max(0, self.weights.min_rows - len(wanted))]
            hidden = hidden[torch.tensor(rows, device=self.device)]
        return self.choose(hidden)[: len(ids if wanted is None else wanted)]

    def choose(self, hidden: Tensor) -> list[int]:
        """The most probable next token after each of some tokens.

        Args:
            hidden: (N, D), after the last block.
        """
        chosen: list[int] = self.choose_on_device(hidden).tolist()
        return chosen

    def choose_on_device(self, hidden: Tensor) -> Tensor:
        """The same as a tensor, (N,)."""
        # Of equal logits argmax takes the first, as transformers does; no copy of them is made.
        return self.weights.head(self.weights.norm(hidden)).argmax(-1)


class _CacheAttention:
    """Attention of a pass: (N, 3, H, d) before rotary -> (N, H, d), in the layer that is set."""

    def __init__(self, decoder: Decoder, cache: KVCache, segments: Sequence[Segment], num_padding: int) -> None:
        self.layer = 0
        self.cache, self.segments, self.num_padding, self.scaling = cache, segments, num_padding, decoder.scaling
        slots: list[int] = []
        positions: list[int] = []
        self.num_tokens = 0
        for segment in segments:
            length = segment.end - segment.start
            slots += [segment.slot] * length
            positions += range(segment.start, segment.end)
            self.num_tokens += length
        self.slots, self.positions = torch.tensor([slots, positions], device=decoder.device).unbind(0)
        self.cos, self.sin = decoder.cos[self.positions], decoder.sin[self.positions]
        self.groups = _group(segments, cache.shape)
        self.masks = [_mask(group, cache.shape.dtype, decoder.device) for group in self.groups]

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
        cached = self.cache.layers[self.layer][segment.slot : segment.slot + len(group), ..., :length, :]
        output = F.scaled_dot_product_attention(
            query.unflatten(0, (len(group), -1)).transpose(1, 2),  # (S, H, new tokens of each, d)
            cached[:, 0],
            cached[:, 1],
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scaling,
        )
        return output.transpose(1, 2).flatten(0, 1)


def _group(segments: Sequence[Segment], shape: CacheShape) -> list[list[Segment]]:
    """Segments whose attention is one call: single tokens of neighbouring slots whose lengths are alike.

    The call covers the positions of the longest, so a longer or shorter neighbour is taken only where the positions
    that this adds are read faster than another call is made.
    """
    position_bytes = 2 * shape.num_heads * shape.head_dim * shape.dtype.itemsize
    groups: list[list[Segment]] = []
    longest = 0
    for segment in segments:
        length = round_up(segment.end, MASK_STEP)
        is_single = segment.end - segment.start == 1 and segment.prefix_slot is None
        group = groups[-1] if groups and is_single else []
        if group and group[0].end - group[0].start == 1 and group[-1].slot + 1 == segment.slot:
            added = len(group) * (length - longest) if length > longest else longest - length
            if added * position_bytes <= CALL_BYTES:
                group.append(segment)
                longest = max(longest, length)
                continue
        groups.append([segment])
        longest = length
    return groups


def _mask(group: Sequence[Segment], dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """(S, 1, new tokens of each, positions): 0 where a token attends and -inf elsewhere; None for a whole prompt.

    A sum over more positions than a token has, up to a multiple of MASK_STEP, is the same to the bit: what a mask
    hides adds zeros at its end. So the answer of a token does not depend on its neighbours' lengths.
    """
    num_tokens, length = group[0].end - group[0].start, round_up(max(segment.end for segment in group), MASK_STEP)
    if group[0].start == 0 and num_tokens > 1:
        return None
    last = torch.tensor([range(segment.start, segment.end) for segment in group], device=device)
    hidden = torch.arange(length, device=device) > last.view(len(group), 1, num_tokens, 1)
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)


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


def _rotary_table(model: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, (P, 1, 1, 2, R / 2) each."""
    config, weight = model.config, model.lm_head.weight
    positions = torch.arange(config.max_position_embeddings, device=weight.device)
    with torch.inference_mode():
        cos, sin = model.model.rotary_emb(weight.new_empty(0, dtype=dtype), positions[None])
        cos, sin = (x[0].unflatten(-1, (2, -1))[:, None, None] for x in (cos, sin))
        sign = torch.tensor([[-1.0], [1.0]], dtype=dtype, device=weight.device)
        return cos.contiguous(), sin * sign
