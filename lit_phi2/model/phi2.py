"""Phi-2 with a fused Wqkv: transformers' Phi, except that q, k and v are one linear layer.

    hidden (..., D) -> norm -+-> Wqkv -> (..., 3, H, d) -> attention -> (..., H, d) -> dense -+
                             |                                                                +-> + hidden (..., D)
                             +-> fc1 -> GELU -> fc2 ------------------------------------------+

The recipe names `Wqkv`, as Phi-2 was first published. transformers keeps q_proj, k_proj and v_proj apart; PEFT finds no
Wqkv there and gives no warning.

`block_forward` is the only forward of a block. Training and evaluation call it with packed attention
(`packed_forward`), generation with attention over a key/value cache (`generation/decoder.py`), and transformers' own
code with attention over its cache (`Phi2Block.forward`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PhiConfig, PhiForCausalLM
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.phi.modeling_phi import PhiAttention, PhiDecoderLayer, eager_attention_forward

from lit_phi2.errors import InputError
from lit_phi2.model.attention import apply_rotary_emb, packed_attention, packed_layout
from lit_phi2.model.device import trim_malloc
from lit_phi2.model.fusion import EAGER, BlockOps
from lit_phi2.model.kernels import gelu, has_gelu_slope
from lit_phi2.model.linear import FrozenLinear
from lit_phi2.types import Segment

TRIM_BLOCKS = 8  # between two returns of holes: Phi-2 in 8 bits takes 4.7 GB instead of 5.0 over a row of 512 tokens


class FusedPhiForCausalLM(PhiForCausalLM):
    """transformers' Phi with Phi2Block in every layer; `loading.load_phi2` fills it from an ordinary checkpoint.

    Raises:
        InputError: the config has grouped keys and values or normalized queries, which no Phi-2 has.
    """

    block_ops = EAGER  # of forward passes with gradients
    trims_heap = False  # a forward with gradients, and its backward, return the holes of the heap: less memory
    is_streamed = False  # each forward of a block reads its weights, which every other block then loses

    def __init__(self, config: PhiConfig) -> None:
        if config.num_key_value_heads != config.num_attention_heads or config.qk_layernorm:
            raise InputError(
                "model.base: a fused Wqkv needs as many key as query heads, and no qk_layernorm, as in Phi-2; this "
                "config differs."
            )
        super().__init__(config)
        self.lm_head = FrozenLinear(config.hidden_size, config.vocab_size)
        self.model.layers = nn.ModuleList(Phi2Block(config, index) for index in range(config.num_hidden_layers))


class Phi2Block(PhiDecoderLayer):
    """A block with FrozenLinear layers and one Wqkv, whose rows are those of q, then k, then v."""

    def __init__(self, config: PhiConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        attn, mlp = self.self_attn, self.mlp
        del attn.q_proj, attn.k_proj, attn.v_proj
        attn_width = config.num_attention_heads * attn.head_dim
        attn.Wqkv = FrozenLinear(config.hidden_size, 3 * attn_width)
        attn.dense = FrozenLinear(attn_width, config.hidden_size)
        mlp.fc1 = FrozenLinear(config.hidden_size, config.intermediate_size)
        mlp.fc2 = FrozenLinear(config.intermediate_size, config.hidden_size)
        if config.hidden_act == "gelu_new":  # the same function, in one pass over memory instead of six
            mlp.activation_fn = Gelu()

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]  # given by keyword
        """(B, T, D) -> (B, T, D), called by transformers' PhiModel: attention over the cache, if there is one."""
        return block_forward(self, hidden_states, partial(cached_attention, self.self_attn, **kwargs))


class Gelu(nn.Module):
    """`kernels.gelu` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise, any shape."""
        return gelu(x)


def packed_forward(
    model: FusedPhiForCausalLM,
    input_ids: Tensor,
    position_ids: Tensor,
    *,
    segments: list[Segment] | None = None,
    activation_checkpointing: bool = False,
    num_blocks: int | None = None,
) -> Tensor:
    """(B, T, D): the input of the output layer, with the examples of every row kept apart.

    Args:
        model: with or without adapters in its layers.
        input_ids: (B, T).
        position_ids: (B, T), restarting at 0 where an example begins.
        segments: of the examples; None finds them in position_ids.
        activation_checkpointing: save the input of each block only, and recompute the block in backward.
        num_blocks: only the first of them; None for all.
    """
    phi = model.model
    ops = model.block_ops if torch.is_grad_enabled() else EAGER  # so that compiled ones are compiled once
    layout = packed_layout(position_ids, segments)
    hidden = phi.embed_dropout(phi.embed_tokens(input_ids.flatten()))
    cos, sin = phi.rotary_emb(hidden, position_ids.flatten()[None])
    half = cos.shape[-1] // 2  # transformers repeats each angle
    cos, sin = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
    attend = partial(packed_attention, cos=cos, sin=sin, layout=layout, rotate_qkv=ops.rotate_qkv)
    for number, block in enumerate(phi.layers[:num_blocks]):
        # Not before the first: what a step leaves is what the next one takes again.
        if model.trims_heap and number and number % TRIM_BLOCKS == 0 and torch.is_grad_enabled():
            _trim_here(hidden)
        attn = block.self_attn
        dropout = attn.attention_dropout if block.training else 0.0
        attention = partial(attend, scaling=attn.scaling, dropout=dropout)
        if activation_checkpointing and torch.is_grad_enabled():
            hidden = checkpoint(block_forward, block, hidden, attention, ops, use_reentrant=False)
        else:
            hidden = block_forward(block, hidden, attention, ops)
    return phi.final_layernorm(hidden).view(*input_ids.shape, -1)


def _trim_here(hidden: Tensor) -> None:
    """Return the holes of the heap to the system, now and when backward arrives here."""
    trim_malloc()
    if hidden.requires_grad:
        hidden.register_hook(lambda grad: trim_malloc())


def block_forward(block: Any, hidden: Tensor, attention: Callable[[Tensor], Tensor], ops: BlockOps = EAGER) -> Tensor:
    """The forward of a block, (..., D) -> (..., D): attention and MLP read the same normalized input.

    Args:
        block: a Phi2Block, with or without adapters in its layers.
        hidden: (..., D).
        attention: (..., 3, H, d) -> (..., H, d); applies the rotary embedding too.
        ops: of which add_residual is called here.
    """
    attn, mlp = block.self_attn, block.mlp
    normed = block.input_layernorm(hidden)
    qkv = attn.Wqkv(normed).unflatten(-1, (3, -1, attn.head_dim))
    attn_output = attn.dense(attention(qkv).flatten(-2))
    mlp_output = mlp_forward(mlp, normed)
    dropout = block.resid_dropout.p if block.training else 0.0
    return ops.add_residual(hidden, attn_output, mlp_output, dropout=dropout)


def mlp_forward(mlp: Any, normed: Tensor) -> Tensor:
    """fc2(gelu(fc1 normed)); with `applies_gelu` backward keeps GELU's input alone, and computes GELU again."""
    inner = mlp.fc1(normed)
    if getattr(mlp.fc2, "applies_gelu", False) and isinstance(mlp.activation_fn, Gelu) and has_gelu_slope(inner):
        output: Tensor = mlp.fc2(inner, after_gelu=True)
        return output
    output = mlp.fc2(mlp.activation_fn(inner))
    return output


def cached_attention(
    attn: PhiAttention,
    qkv: Tensor,
    *,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Cache | None = None,
    **kwargs: Any,
) -> Tensor:
    """(B, T, 3, H, d) -> (B, T, H, d) through transformers' attention functions and its cache.

    Args:
        attn: of the block.
        qkv: before rotary.
        position_embeddings: cos and sin, (B or 1, T, R), each angle twice.
        attention_mask: as transformers makes it.
        past_key_values: the cache, which takes the new keys and values; None attends to the T tokens alone.
        **kwargs: passed on to the attention function.
    """
    num_rows, num_tokens = qkv.shape[:2]
    half = position_embeddings[0].shape[-1] // 2
    cos, sin = (x[..., :half].expand(num_rows, -1, -1).flatten(0, 1) for x in position_embeddings)
    rotated = apply_rotary_emb(qkv[:, :, :2].flatten(0, 1), cos, sin).unflatten(0, (num_rows, num_tokens))
    query, key = rotated.permute(2, 0, 3, 1, 4)  # (B, H, T, d) each
    value = qkv[:, :, 2].transpose(1, 2)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, attn.layer_idx)
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(attn.config._attn_implementation, eager_attention_forward)
    dropout = attn.attention_dropout if attn.training else 0.0
    attn_out, _ = attention(attn, query, key, value, attention_mask, dropout=dropout, scaling=attn.scaling, **kwargs)
    return attn_out.reshape(num_rows, num_tokens, -1, attn.head_dim)
