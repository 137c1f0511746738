"""Original code: Phi-2 as it was first published, by the names that transformers gives the same things.

    transformer.embd.wte              model.embed_tokens
    transformer.h.N.ln                model.layers.N.input_layernorm
    transformer.h.N.mixer.Wqkv        model.layers.N.self_attn.{q_proj,k_proj,v_proj}
    transformer.h.N.mixer.out_proj    model.layers.N.self_attn.dense
    transformer.h.N.mlp.fc1, fc2      model.layers.N.mlp.fc1, fc2
    lm_head.ln                        model.final_layernorm
    lm_head.linear                    lm_head

The rows of Wqkv are those of q, then k, then v, each head by head: the original modeling_phi.py reads its output as
"(three h d)". They are therefore cut in three, and no row moves.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

# Keys of the original config.json; rotary_dim and pad_vocab_size_multiple are read too.
ORIGINAL_KEYS = {
    "n_embd": "hidden_size",
    "n_inner": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_head_kv": "num_key_value_heads",
    "n_positions": "max_position_embeddings",
    "activation_function": "hidden_act",
    "layer_norm_epsilon": "layer_norm_eps",
    "attn_pdrop": "attention_dropout",
}
ORIGINAL_MODEL_TYPES = ("phi-msft", "phi")  # at first "phi"; renamed when transformers took that name
_NAMES = (
    (r"^transformer\.embd\.wte\.", "model.embed_tokens."),
    (r"^transformer\.h\.(\d+)\.ln\.", r"model.layers.\1.input_layernorm."),
    (r"^transformer\.h\.(\d+)\.mixer\.out_proj\b", r"model.layers.\1.self_attn.dense"),
    (r"^transformer\.h\.(\d+)\.mixer\.Wqkv\b", r"model.layers.\1.self_attn.Wqkv"),
    (r"^transformer\.h\.(\d+)\.mlp\.(fc[12])\b", r"model.layers.\1.mlp.\2"),
    (r"^lm_head\.ln\.", "model.final_layernorm."),
    (r"^lm_head\.linear\.", "lm_head."),
)


def is_original_config(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is the original code's."""
    return config.get("model_type") in ORIGINAL_MODEL_TYPES and "n_embd" in config and "hidden_size" not in config


def convert_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The original config.json, whose values are checked, with the keys of transformers' Phi.

    >>> original = {"n_embd": 2560, "n_head": 32, "rotary_dim": 32, "vocab_size": 50295}
    >>> [convert_config(original)[key] for key in ("intermediate_size", "vocab_size", "partial_rotary_factor")]
    [10240, 50304, 0.4]
    """
    kept = {key: value for key, value in config.items() if key not in ORIGINAL_KEYS}
    renamed = {new: config[key] for key, new in ORIGINAL_KEYS.items() if config.get(key) is not None}
    head_dim = max(1, config["n_embd"] // config["n_head"])  # more heads than elements are refused later
    multiple = config.get("pad_vocab_size_multiple") or 64
    return {
        "intermediate_size": 4 * config["n_embd"],
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
        **kept,
        **renamed,
        "model_type": "phi",
        "vocab_size": math.ceil(config["vocab_size"] / multiple) * multiple,
        "rope_theta": 10000.0,
        "partial_rotary_factor": _rotary_factor(min(config.get("rotary_dim") or 32, head_dim), head_dim),
    }


def convert_name(name: str) -> str:
    """A parameter or layer by transformers' name, with Wqkv whole; other names are returned as they are.

    >>> convert_name("transformer.h.3.mixer.out_proj.bias")
    'model.layers.3.self_attn.dense.bias'
    """
    for pattern, replacement in _NAMES:
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    return name


def _rotary_factor(rotary_dim: int, head_dim: int) -> float:
    """The fraction of a head that transformers, which rounds down, makes rotary_dim again."""
    factor = rotary_dim / head_dim
    return factor if int(head_dim * factor) == rotary_dim else math.nextafter(factor, 1)
