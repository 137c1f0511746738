"""MLX: the adapter as mlx-lm reads it.

    q_proj  A (r, in), B (out, r)  ->  self_attn.q_proj.lora_a (in, r), .lora_b (r, out), and the scale

mlx-lm reads a base's rope settings at the top level of its config.json, and takes Phi-2's own where there are none.
transformers 5 nests them, so a base with other values would be computed wrong without a message. For such a base a copy
with both forms is written beside the adapter, and for one without num_key_value_heads, which mlx-lm takes to be 32.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lit_phi2.adapters.adapter import Adapter
from lit_phi2.adapters.peft_format import save_tensors
from lit_phi2.base_config import CONFIG_FILE
from lit_phi2.errors import InputError
from lit_phi2.export.imports import MLX_CONFIG_FILE, MLX_KEY, MLX_WEIGHTS_FILE
from lit_phi2.export.merged import write_merged
from lit_phi2.export.metadata import adapter_metadata, lora_scale
from lit_phi2.export.weights import ModelWeights, lora_pairs
from lit_phi2.original_code import is_original_config
from lit_phi2.pretrained import BaseModel
from lit_phi2.utils.json_objects import read_json_object

BASE_COPY = "base"
# The defaults of mlx_lm/models/phi.py.
_MLX_DEFAULTS = {"partial_rotary_factor": 0.4, "rope_theta": 10000.0, "num_key_value_heads": 32}
_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # the same function


def write_mlx_adapter(adapter: Adapter, num_layers: int, folder: Path, provenance: Mapping[str, str] = {}) -> None:
    """Write the adapter; its weights are float32, transposed and otherwise as they are."""
    pairs, settings = lora_pairs(adapter), adapter.settings
    scale = lora_scale(settings)
    tensors = {}
    for layer, pair in pairs.items():
        tensors[f"{layer}.lora_a"] = pair.a.t().contiguous()
        tensors[f"{layer}.lora_b"] = (pair.b * (pair.scale / scale)).t().contiguous()  # mlx-lm has one scale for all
    config = {
        "fine_tune_type": "lora",
        "num_layers": num_layers,
        "lora_parameters": {
            "rank": settings.lora_r,
            "scale": scale,
            "dropout": 0.0,
            "keys": sorted({layer.split(".", 3)[3] for layer in pairs}),
        },
        MLX_KEY: adapter_metadata(adapter, num_layers),
    }
    (folder / MLX_WEIGHTS_FILE).write_bytes(save_tensors(tensors, {"format": "mlx", **provenance}))
    (folder / MLX_CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def write_base_copy(base: BaseModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path | None:
    """Write a copy of the base that mlx-lm computes right, or nothing if it does so with the base itself.

    Returns:
        The copy's folder.
    """
    weights = ModelWeights(base, None)
    if not needs_base_copy(weights):
        return None
    copy = folder / BASE_COPY
    copy.mkdir()
    write_merged(weights, tokenizer, copy, dtype=None)
    return copy


def needs_base_copy(weights: ModelWeights) -> bool:
    """Whether mlx-lm would not find the base's weights, or would read other rope settings than transformers does."""
    config = read_json_object(weights.base.folder / CONFIG_FILE)
    values = weights.rope | {"num_key_value_heads": weights.config.num_attention_heads}
    is_found = all(name.startswith("model") for name in weights.base.weight_files)
    return (
        not is_found
        or is_original_config(config)
        or any(config.get(key, default) != values[key] for key, default in _MLX_DEFAULTS.items())
    )


def check_mlx_base(weights: ModelWeights) -> None:
    """Refuse a base that mlx-lm's phi computes otherwise than transformers.

    Raises:
        InputError: names the setting.
    """
    config = weights.config
    problem = None
    if config.hidden_act not in _GELU:
        problem = f"its hidden_act is {config.hidden_act!r}, and mlx-lm's phi computes gelu_new"
    elif weights.rope["rope_type"] != "default":
        problem = f"its rope_type is {weights.rope['rope_type']!r}; only 'default' is supported"
    elif weights.head_dim * config.num_attention_heads != config.hidden_size:
        problem = f"its heads are {weights.head_dim} wide; expected hidden_size / num_attention_heads"
    if problem:
        raise InputError(f"--format mlx: this base cannot run in mlx-lm: {problem}. Use --format peft or merged.")
