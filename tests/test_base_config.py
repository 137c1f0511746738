"""config.json of a base: what is kept of it, and that it means the same as in transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PhiConfig

from lit_phi2.base_config import make_phi_config, read_base_config
from lit_phi2.errors import InputError

# As microsoft/phi-2 has it, in the form before transformers 5.
PHI2 = {
    "architectures": ["PhiForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 50256,
    "embd_pdrop": 0.0,
    "eos_token_id": 50256,
    "hidden_act": "gelu_new",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 10240,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "phi",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "partial_rotary_factor": 0.4,
    "qk_layernorm": False,
    "resid_pdrop": 0.1,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.37.0",
    "use_cache": True,
    "vocab_size": 51200,
}


def write(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}},
        {"rope_parameters": {"rope_theta": 5e5}, "partial_rotary_factor": 0.8},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 4}, "rope_theta": 2e4},
        {"rope_theta": 1e6, "partial_rotary_factor": 1},
    ],
)
def test_the_values_are_those_that_transformers_reads(rope: dict[str, Any], tmp_path: Path) -> None:
    """Reference: PhiConfig.from_pretrained on the same file, in either form of the rotary settings."""
    folder = write(tmp_path, PHI2 | rope)
    native, config = PhiConfig.from_pretrained(folder), make_phi_config(read_base_config(folder))
    for name in PHI2.keys() - {"architectures", "torch_dtype", "transformers_version", "rope_scaling"}:
        if name not in ("bos_token_id", "eos_token_id", "initializer_range", "partial_rotary_factor", "rope_theta"):
            assert getattr(config, name) == getattr(native, name), name
    expected = {key: value for key, value in native.rope_parameters.items() if key != "type"}
    assert config.rope_parameters == expected


def test_keys_that_phi_lacks_do_not_reach_transformers(tmp_path: Path) -> None:
    """An attention kernel from the hub, remote code and settings of generation."""
    hostile = {
        "attn_implementation": "somebody/kernel",
        "_attn_implementation": "somebody/kernel",
        "auto_map": {"AutoConfig": "code.Config"},
        "temperature": 9.0,
        "quantization_config": {"quant_method": "bitsandbytes"},
    }
    config = make_phi_config(read_base_config(write(tmp_path, PHI2 | hostile)))
    assert config._attn_implementation is None
    assert not [key for key in hostile if key[0] != "_" and getattr(config, key, None) is not None]


def test_a_null_dropout_or_key_count_has_its_default(tmp_path: Path) -> None:
    """transformers writes null for both in some versions."""
    values = read_base_config(write(tmp_path, PHI2 | {"attention_dropout": None, "num_key_value_heads": None}))
    config = make_phi_config(values)
    assert (config.attention_dropout, config.num_key_value_heads) == (0.0, 32)


def test_a_head_of_which_an_odd_number_is_rotated_is_refused(tmp_path: Path) -> None:
    """The angles come in pairs; a head of 80 with 0.4125 would rotate 33 of its elements."""
    with pytest.raises(InputError, match=r"partial_rotary_factor 0\.4125 rotates 33 of the 80 elements"):
        read_base_config(write(tmp_path, PHI2 | {"partial_rotary_factor": 0.4125}))
