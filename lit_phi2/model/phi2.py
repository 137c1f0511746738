"""Phi-2 with a fused Wqkv: transformers' Phi, except that q, k and v are one linear layer.

    hidden (B, T, D) -> Wqkv -> (B, T, 3 D) -> q, k, v -> rotary -> attention -> dense

The recipe names `Wqkv`, as Phi-2 was first published. transformers keeps q_proj, k_proj and v_proj apart, where PEFT
finds no Wqkv and says nothing. An ordinary checkpoint is fused while it is read, exactly: rows of weights are moved,
none is computed.

`hidden_states` is the way through the model while it learns or is measured: only what training needs, with packed
examples kept apart. transformers' own forward, with masks and cache, serves generation; tests hold the two together.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PhiConfig, PhiForCausalLM
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.phi.modeling_phi import (
    PhiAttention,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from lit_phi2.errors import InputError
from lit_phi2.model.attention import PackedLayout, packed_attention, packed_layout
from lit_phi2.model.kernels import dropout_add_residual, gelu
from lit_phi2.model.linear import FrozenLinear


class FusedPhiAttention(PhiAttention):
    """Phi's attention with one linear layer for q, k and v; the rows of Wqkv are q's, then k's, then v's."""

    def __init__(self, config: PhiConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        del self.q_proj, self.k_proj, self.v_proj
        width = config.num_attention_heads * self.head_dim
        self.Wqkv = FrozenLinear(config.hidden_size, 3 * width)
        self.dense = FrozenLinear(width, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) -> (B, T, D), with the signature of transformers' PhiAttention."""
        shape = hidden_states.shape[:-1]
        fused = self.Wqkv(hidden_states).view(*shape, 3, -1, self.head_dim)
        query, key, value = fused.permute(2, 0, 3, 1, 4)  # (3, B, heads, T, head_dim)
        cos, sin = position_embeddings
        query_turned, key_turned = apply_rotary_pos_emb(
            query[..., : self.rotary_ndims], key[..., : self.rotary_ndims], cos, sin
        )
        query = torch.cat((query_turned, query[..., self.rotary_ndims :]), dim=-1)
        key = torch.cat((key_turned, key[..., self.rotary_ndims :]), dim=-1)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.dense(output.reshape(*shape, -1)), weights


class Gelu(nn.Module):
    """gelu of `elementwise.py`, as a module in the place of transformers' own."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, elementwise."""
        return gelu(x)


class FusedPhiForCausalLM(PhiForCausalLM):
    """transformers' Phi with FusedPhiAttention in every layer; load_phi2 fills it from an ordinary checkpoint.

    Raises:
        InputError: the config asks for grouped keys and values or for normed queries, which no Phi-2 has.
    """

    def __init__(self, config: PhiConfig) -> None:
        if config.num_key_value_heads != config.num_attention_heads or config.qk_layernorm:
            raise InputError(
                "model.base: a fused Wqkv needs as many key as query heads, and no qk_layernorm, as in Phi-2; this "
                "config has other ones."
            )
        super().__init__(config)
        self.lm_head = FrozenLinear(config.hidden_size, config.vocab_size)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn = FusedPhiAttention(config, index)
            layer.mlp.fc1 = FrozenLinear(config.hidden_size, config.intermediate_size)
            layer.mlp.fc2 = FrozenLinear(config.intermediate_size, config.hidden_size)
            if config.hidden_act == "gelu_new":  # the same function, in one pass over memory instead of six
                layer.mlp.activation_fn = Gelu()


def packed_forward(
    model: FusedPhiForCausalLM, input_ids: Tensor, position_ids: Tensor, *, activation_checkpointing: bool = False
) -> Tensor:
    """What the head reads, (B, T, D), with the examples of every row kept apart.

    Args:
        model: with or without adapters in its layers.
        input_ids: (B, T).
        position_ids: (B, T), restarting at 0 where an example begins.
        activation_checkpointing: keep the input of each block alone, and work the block out again in backward.
    """
    phi = model.model
    layout = packed_layout(position_ids)
    hidden = phi.embed_dropout(phi.embed_tokens(input_ids.flatten()))
    cos, sin = phi.rotary_emb(hidden, position_ids.flatten()[None])
    half = cos.shape[-1] // 2  # transformers holds each angle twice
    cos, sin = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
    for layer in phi.layers:
        if activation_checkpointing and torch.is_grad_enabled():
            hidden = checkpoint(_block, layer, hidden, cos, sin, layout, use_reentrant=False)
        else:
            hidden = _block(layer, hidden, cos, sin, layout)
    return phi.final_layernorm(hidden).view(*input_ids.shape, -1)


def _block(layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor, layout: PackedLayout) -> Tensor:
    """A block of Phi, (N, D) -> (N, D): attention and MLP side by side, both reading the same normed input."""
    attention, mlp = layer.self_attn, layer.mlp
    normed = layer.input_layernorm(hidden)
    qkv = attention.Wqkv(normed).view(len(hidden), 3, -1, attention.head_dim)
    of_weights, of_sums = (attention.attention_dropout, layer.resid_dropout.p) if layer.training else (0.0, 0.0)
    mixed = packed_attention(qkv, cos, sin, layout, scaling=attention.scaling, dropout=of_weights)
    attended = attention.dense(mixed.flatten(1))
    thought = mlp.fc2(mlp.activation_fn(mlp.fc1(normed)))
    return dropout_add_residual(hidden, attended, thought, dropout=of_sums)
