"""StaticDecoder: decode passes of one shape for all slots, as a GPU wants them.

    last token and position of every slot  ->  one pass over the first 256, 512, ... positions of the cache  ->  tokens

A slot without a sequence takes part with the last position of its cache, which no prompt has. On CUDA a pass of each
length is captured once as a graph and replayed: launching its kernels one by one takes longer than running them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  the name that torch's own documentation uses

from lit_phi2.generation.cache_attention import apply_rotary_emb_
from lit_phi2.generation.decoder import Decoder
from lit_phi2.generation.kv_cache import KVCache
from lit_phi2.model.attention import attend
from lit_phi2.model.phi2 import block_forward

LENGTH_STEP = 256  # positions; every slot attends to as many as the longest has, rounded up


class StaticDecoder:
    """Passes of one new token for every slot.

    Args:
        decoder: gives weights and rotary embedding.
        cache: of these passes; a larger cache needs a new StaticDecoder.
    """

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self.decoder, self.cache = decoder, cache
        self.slots = torch.arange(cache.num_slots, device=decoder.device)
        self.tokens, self.positions = torch.zeros_like(self.slots), torch.zeros_like(self.slots)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @torch.inference_mode()
    def forward(self, last_tokens: Sequence[tuple[int, int] | None]) -> list[int]:
        """The next token of every slot.

        Args:
            last_tokens: token and position of the last one of each slot; None for a slot without a sequence.
        """
        idle = (0, self.cache.capacity - 1)
        tokens, positions = zip(*(idle if last is None else last for last in last_tokens), strict=True)
        longest = 1 + max(last[1] for last in last_tokens if last is not None)
        length = min(-(-longest // LENGTH_STEP) * LENGTH_STEP, self.cache.capacity)
        self.tokens.copy_(torch.tensor(tokens))
        self.positions.copy_(torch.tensor(positions))
        chosen: list[int] = self._run(length).tolist()
        return chosen

    def _run(self, length: int) -> Tensor:
        if self.slots.device.type != "cuda":
            return self._pass(length)
        if length not in self._graphs:
            self._pass(length)  # what libraries allocate at first use must not be a part of the graph
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                chosen = self._pass(length)
            self._graphs[length] = graph, chosen
        graph, chosen = self._graphs[length]
        graph.replay()
        return chosen

    def _pass(self, length: int) -> Tensor:
        """(S,): the next token of every slot, each attending to at most `length` positions."""
        decoder, weights = self.decoder, self.decoder.weights
        hidden = F.embedding(self.tokens, weights.embed).to(weights.dtype)
        cos, sin = decoder.cos[self.positions], decoder.sin[self.positions]
        visible = torch.arange(length, device=hidden.device) <= self.positions[:, None]
        mask = visible[:, None, None]  # (S, 1, 1, length)
        for layer, block in enumerate(weights.blocks):

            def attention(qkv: Tensor, layer: int = layer) -> Tensor:
                dtype = qkv.dtype
                apply_rotary_emb_(qkv[:, :2], cos, sin)
                qkv = qkv.to(self.cache.shape.dtype)
                self.cache.write(layer, self.slots, self.positions, qkv[:, 1:])
                keys, values = self.cache.layers[layer][..., :length, :].unbind(0)  # (S, H, length, d) each
                query = qkv[:, 0, :, None]  # (S, H, 1, d)
                output = attend(query, keys, values, attn_mask=mask, scale=decoder.scaling)
                return output[:, :, 0].to(dtype)

            hidden = block_forward(block, hidden, attention)
        return decoder.choose_on_device(hidden)
