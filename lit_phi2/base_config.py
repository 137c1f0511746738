"""Base config: config.json of a Phi, checked before anything is built or allocated from it.

    config.json -> values that a Phi has, each of its kind and in its range -> PhiConfig

The config of Phi-2's original code, which has other keys, is converted first (`original_code.py`).

Only the keys that Phi's computation reads are kept. transformers sets every other key as an attribute of its config,
and some of these choose code (an attention kernel from the hub) or generation settings.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_phi2.errors import InputError
from lit_phi2.original_code import ORIGINAL_KEYS, convert_config, is_original_config
from lit_phi2.utils.json_objects import (
    OBJECT,
    TEXT,
    Kind,
    check_values,
    integer,
    nullable,
    number,
    one_of,
    read_json_object,
)

if TYPE_CHECKING:
    from transformers import PhiConfig

CONFIG_FILE = "config.json"

# The upper bounds are far above any Phi; they keep a hostile config from building forever. Before memory is allocated,
# model/loading.py compares every shape with the weights that the files hold.
_SIZES = {
    "vocab_size": integer(1, 2**24),
    "hidden_size": integer(1, 2**17),
    "intermediate_size": integer(1, 2**20),
    "num_hidden_layers": integer(1, 2**10),
    "num_attention_heads": integer(1, 2**12),
    "max_position_embeddings": integer(1, 2**24),
}
_FRACTION = number(0, 1)
_OPTIONAL = {
    "num_key_value_heads": nullable(integer(1, 2**12)),
    "head_dim": nullable(integer(1, 2**17)),
    "layer_norm_eps": number(0, 1, above_low=True),
    "resid_pdrop": _FRACTION,
    "embd_pdrop": _FRACTION,
    "attention_dropout": nullable(_FRACTION),
    "qk_layernorm": one_of(False),
    "tie_word_embeddings": one_of(False),
}
_ORIGINAL = {
    **{key: nullable((_SIZES | _OPTIONAL).get(hf_key, TEXT)) for key, hf_key in ORIGINAL_KEYS.items()},
    **{key: _SIZES[ORIGINAL_KEYS[key]] for key in ("n_embd", "n_layer", "n_head", "n_positions")},
    "vocab_size": _SIZES["vocab_size"],
    "rotary_dim": nullable(integer(1, 2**17)),
    "pad_vocab_size_multiple": nullable(integer(1, 2**12)),
}
_ORIGINAL_REQUIRED = ("n_embd", "n_layer", "n_head", "n_positions", "vocab_size")
_ROPE_FORMS = {"rope_parameters": nullable(OBJECT), "rope_scaling": nullable(OBJECT)}
# Of the other types the frequencies depend on the length of the longest example in a batch, or on more settings.
_ROPE = {
    "rope_type": one_of("default", "linear"),
    "rope_theta": number(0, 1e12, above_low=True),
    "partial_rotary_factor": number(0, 1, above_low=True),
    "factor": number(1, 1e6),
}


def read_base_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a Phi: the keys that its computation reads, checked.

    Raises:
        InputError: names the file and the first key that is absent, of another kind, or does not fit the others.
    """
    source = f"model.base: {folder / CONFIG_FILE}"
    config = read_json_object(folder / CONFIG_FILE, setting="model.base")
    if is_original_config(config):
        check_values(config, _ORIGINAL, source=source, required=_ORIGINAL_REQUIRED)
        config = convert_config(config)
    if config.get("model_type") != "phi":
        raise InputError(f"{source}: model_type is {config.get('model_type')!r}; expected 'phi', as Phi-2 is.")
    kinds = _SIZES | _OPTIONAL | {"hidden_act": _activation()}
    check_values(config, kinds | _ROPE_FORMS, source=source, required=_SIZES)
    _check_eos(config, source)
    values = {key: config[key] for key in kinds if config.get(key) is not None}
    values["rope_parameters"] = _rope_parameters(config, source)
    _check_heads(values, source)
    return values


def make_phi_config(values: dict[str, Any]) -> "PhiConfig":
    """transformers' config from the values of `read_base_config`."""
    from transformers import PhiConfig  # here, so that what only reads the values does not load it

    return PhiConfig(**{**values, "rope_parameters": dict(values["rope_parameters"])})


def _activation() -> Kind:
    from transformers.activations import ACT2FN  # loads torch, which naming a base does not need

    return one_of(*sorted(ACT2FN))


def _check_eos(config: dict[str, Any], source: str) -> None:
    eos = config.get("eos_token_id")
    highest = config["vocab_size"] - 1
    for token_id in eos if isinstance(eos, list) else [eos]:
        if token_id is not None:
            check_values({"eos_token_id": token_id}, {"eos_token_id": integer(0, highest)}, source=source)


def _rope_parameters(config: dict[str, Any], source: str) -> dict[str, Any]:
    """The rotary settings in the form of transformers 5, from that form or the former one.

    The order of precedence is that of transformers' `convert_rope_params_to_dict`.
    """
    form = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = dict(config.get(form) or {})
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", 10_000.0))
    rope.setdefault("partial_rotary_factor", config.get("partial_rotary_factor", 0.5))
    is_linear = rope["rope_type"] == "linear"
    check_values(rope, _ROPE, source=f"{source}: {form}", required=["factor"] if is_linear else [])
    return {key: rope[key] for key in _ROPE if key in rope and (is_linear or key != "factor")}


def _check_heads(values: dict[str, Any], source: str) -> None:
    width, heads = values["hidden_size"], values["num_attention_heads"]
    if values.get("num_key_value_heads", heads) != heads:
        raise InputError(
            f"{source}: num_key_value_heads is {values['num_key_value_heads']}; expected num_attention_heads, "
            f"{heads}, because a fused Wqkv needs as many key as query heads."
        )
    if "head_dim" not in values and width % heads:
        raise InputError(f"{source}: num_attention_heads {heads} does not divide hidden_size {width}.")
    head_dim = values.get("head_dim", width // heads)
    factor = values["rope_parameters"]["partial_rotary_factor"]
    rotary_dim = int(head_dim * factor)
    if rotary_dim < 2 or rotary_dim % 2:
        raise InputError(
            f"{source}: partial_rotary_factor {factor} rotates {rotary_dim} of the {head_dim} elements of a head; "
            "expected an even number of at least 2."
        )
