"""Names: what each runtime calls the tensors of Phi-2.

model.layers.3.self_attn.q_proj.weight   transformers
blk.3.attn_q.weight                      llama.cpp
"""

import re

_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.final_layernorm.weight": "output_norm.weight",
    "model.final_layernorm.bias": "output_norm.bias",
    "lm_head.weight": "output.weight",
    "lm_head.bias": "output.bias",
}
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.dense": "attn_output",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_FROM_GGUF = {gguf: hf for hf, gguf in _IN_LAYER.items()}
_HF_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_GGUF_NAME = re.compile(r"blk\.(\d{1,4})\.([a-z_]+)\.(weight|bias)")


def gguf_name(name: str) -> str:
    """A parameter's name in transformers' Phi -> in GGUF.

    >>> gguf_name("model.layers.3.mlp.fc1.bias")
    'blk.3.ffn_up.bias'
    """
    if name in _TOP:
        return _TOP[name]
    match = _HF_NAME.fullmatch(name)
    if match is None or match[2] not in _IN_LAYER:
        raise ValueError(f"{name}: no parameter of transformers' Phi")
    return f"blk.{match[1]}.{_IN_LAYER[match[2]]}.{match[3]}"


def hf_name(name: str) -> str | None:
    """The inverse of gguf_name, for the parameters of a layer; None for other names.

    >>> hf_name("blk.3.ffn_up.bias")
    'model.layers.3.mlp.fc1.bias'
    """
    match = _GGUF_NAME.fullmatch(name)
    if match is None or match[2] not in _FROM_GGUF:
        return None
    return f"model.layers.{int(match[1])}.{_FROM_GGUF[match[2]]}.{match[3]}"
