"""Decoder: one pass of new tokens through the model, over the cache.

    slot 0, positions 7..8   slot 2, positions 0..41   slot 3, position 19     segments of new tokens, packed
      -> every block: keys and values written into the slots, then each segment attends to its slot up to its own end
      -> hidden states of the tokens asked for -> the most probable next token of each

A decode pass is segments of one token, a prefill segments of whole prompts, a check of drafts segments of a few tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  the name that torch's own documentation uses

from lit_phi2.generation.cache_attention import CacheAttention, Segment
from lit_phi2.generation.kv_cache import CacheShape, KVCache
from lit_phi2.generation.weights import DecodingWeights
from lit_phi2.model.phi2 import FusedPhiForCausalLM, block_forward

NOT_FINITE = -1  # instead of a token: logits that overflowed choose none


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
        attention = CacheAttention(cache, segments, num_padding, self.cos, self.sin, self.scaling)
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
        """The same as a tensor, (N,); NOT_FINITE after a token whose logits are not."""
        # Of equal logits argmax takes the first, as transformers does, and a NaN if there is one.
        logits = self.weights.head(self.weights.norm(hidden))
        chosen = logits.argmax(-1)
        is_finite = logits.gather(-1, chosen[:, None])[:, 0].isfinite()
        return chosen.masked_fill_(~is_finite, NOT_FINITE)


def _rotary_table(model: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, (P, 1, 1, 2, R / 2) each."""
    config, weight = model.config, model.lm_head.weight
    positions = torch.arange(config.max_position_embeddings, device=weight.device)
    with torch.inference_mode():
        cos, sin = model.model.rotary_emb(weight.new_empty(0, dtype=dtype), positions[None])
        cos, sin = (x[0].unflatten(-1, (2, -1))[:, None, None] for x in (cos, sin))
        sign = torch.tensor([[-1.0], [1.0]], dtype=dtype, device=weight.device)
        return cos.contiguous(), sin * sign
