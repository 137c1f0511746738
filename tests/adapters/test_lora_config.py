"""adapter_config.json of any tool: plain LoRA is accepted, and every setting that means something else is named."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PhiForCausalLM

from lit_phi2.adapters.checkpoint import read_adapter
from lit_phi2.adapters.lora_config import PeftSettings, read_peft_settings
from lit_phi2.errors import InputError
from lit_phi2.model.lora import LoraSettings

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "fc1"]}
SETTINGS = PeftSettings(4, 8, ("q_proj", "k_proj", "v_proj", "fc1"), {}, {}, False)

# A value of each key that says how a trained adapter came about, and not what it computes.
HARMLESS = {
    "task_type": "CAUSAL_LM",
    "auto_mapping": {"base_model_class": "PhiForCausalLM"},
    "peft_version": "99.0",
    "revision": "main",
    "inference_mode": True,
    "lora_dropout": 0.1,
    "base_model_name_or_path": "somebody/else",
    "init_lora_weights": "gaussian",
}
# A value other than the default of each key that changes what the weights mean, or what they are added to.
MEANINGFUL: dict[str, Any] = {
    "fan_in_fan_out": True,
    "bias": "all",
    "modules_to_save": ["lm_head"],
    "megatron_config": {"tensor_model_parallel_size": 2},
    "megatron_core": "other.core",
    "trainable_token_indices": [7],
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 2.0},
    "corda_config": {"corda_method": "kpm"},
    "lora_ga_config": {"direction": "random"},
    "use_dora": True,
    "velora_config": {},
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "qalora_group_size": 32,
    "monteclora_config": {},
    "layer_replication": [[0, 2], [1, 2]],
    "runtime_config": {"ephemeral_gpu_offload": True},
    "lora_bias": True,
    "target_parameters": ["fc1.weight"],
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 1},
    "kasa_config": {},
    "ensure_weight_tying": True,
}
# A value of each key whose meaning is kept, and what is kept.
KEPT: dict[str, tuple[Any, Any]] = {
    "use_rslora": (True, True),
    "rank_pattern": ({"fc1": 8}, {"fc1": 8}),
    "alpha_pattern": ({"fc1": 2.5}, {"fc1": 2.5}),
    "exclude_modules": (["fc1"], ("fc1",)),
    "layers_to_transform": (0, (0,)),
    "layers_pattern": ("layers", ("layers",)),
}
KEYS = sorted({field.name for field in dataclasses.fields(LoraConfig)} - PLAIN.keys())


def read(**changes: Any) -> PeftSettings:
    return read_peft_settings(PLAIN | changes, source="adapter_config.json")


@pytest.mark.parametrize("key", KEYS)
def test_every_key_of_peft_is_harmless_or_refused_by_name(key: str) -> None:
    """A key that a newer PEFT adds fails here until it is put into one of the tables, and is refused meanwhile."""
    assert key in HARMLESS or key in MEANINGFUL or key in KEPT
    if key in KEPT:
        value, expected = KEPT[key]
        assert getattr(read(**{key: value}), key) == expected
        return
    if key in HARMLESS:
        assert read(**{key: HARMLESS[key]}) == SETTINGS
        return
    with pytest.raises(InputError, match=rf"adapter_config\.json: {key} is .* Merge it into its base in PEFT"):
        read(**{key: MEANINGFUL[key]})


@pytest.mark.parametrize("key", sorted(LoraConfig().to_dict().keys() - PLAIN.keys()))
def test_every_key_of_peft_is_accepted_with_its_default(key: str) -> None:
    """What PEFT writes for plain LoRA, and null."""
    default = json.loads(json.dumps(LoraConfig().to_dict()[key], default=str))
    assert read(**{key: default}) == SETTINGS
    assert key == "init_lora_weights" or read(**{key: None}) == SETTINGS


@pytest.mark.parametrize(
    "name",
    ["pissa", "pissa_niter_4", "olora", "corda", "eva", "loftq", "lora_ga", "mica", "unheard_of"],
)
def test_an_initialization_that_changes_the_base_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"init_lora_weights is '{name}'; expected one of True, False, gaussian"):
        read(init_lora_weights=name)


@pytest.mark.parametrize("value", [True, False, "gaussian", "orthogonal"])
def test_an_initialization_of_a_and_b_alone_is_accepted(value: Any) -> None:
    assert read(init_lora_weights=value) == SETTINGS


def test_an_unknown_key_is_accepted_only_unset() -> None:
    """It may be of a PEFT to come. 0 is set: of layers_to_transform it is a layer."""
    for unset in (None, False, "", [], {}):
        assert read(some_new_variant=unset) == SETTINGS
    for value in (True, 0, 1, "x", [0], {"a": None}):
        with pytest.raises(InputError, match=r"some_new_variant is .*; this key is unknown here"):
            read(some_new_variant=value)


@pytest.mark.parametrize("alpha", [8.0, 2.5, 1e-9, 0, -4])
def test_any_finite_alpha_is_accepted(alpha: float) -> None:
    """By hand: the scale of B A is alpha / 4."""
    assert float(read(lora_alpha=alpha).scale("model.layers.0.mlp.fc1")) == alpha / 4


@pytest.mark.parametrize("alpha", ["8", True, None, 2.0**31, float("inf"), float("nan")])
def test_an_alpha_that_is_no_number_is_refused(alpha: Any) -> None:
    with pytest.raises(InputError, match=r"lora_alpha is .*; expected a number from"):
        read(lora_alpha=alpha)


@pytest.mark.parametrize(
    ("changes", "selected"),
    [
        ({"target_modules": ["fc1"]}, "0.mlp.fc1 1.mlp.fc1"),
        ({"target_modules": "All-Linear"}, "0.mlp.fc1 0.self_attn.q_proj 1.mlp.fc1 1.self_attn.q_proj"),
        ({"target_modules": r".*1\.(mlp|self_attn)\.(fc1|q_proj)"}, "1.mlp.fc1 1.self_attn.q_proj"),
        ({"target_modules": ["model.layers.1.mlp.fc1"]}, "1.mlp.fc1"),
        (
            {"target_modules": ["fc1", "q_proj"], "exclude_modules": ["1.mlp.fc1"]},
            "0.mlp.fc1 0.self_attn.q_proj 1.self_attn.q_proj",
        ),
        ({"target_modules": ["fc1"], "layers_to_transform": [1, 5]}, "1.mlp.fc1"),
        ({"target_modules": ["fc1"], "layers_to_transform": [1], "layers_pattern": ["h"]}, ""),
        ({"target_modules": ["fc1"], "layers_to_transform": []}, "0.mlp.fc1 1.mlp.fc1"),
    ],
)
def test_the_layers_that_settings_select(changes: dict[str, Any], selected: str) -> None:
    layers = [f"model.layers.{name}" for name in ("0.mlp.fc1", "0.self_attn.q_proj", "1.mlp.fc1", "1.self_attn.q_proj")]
    assert [layer for layer in layers if read(**changes).selects(layer)] == [
        f"model.layers.{s}" for s in selected.split()
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target_modules": r"(?!.*lm_head).*"},
            r"target_modules names '\(\?!.*a regular expression of letters.*Merge it",
        ),
        ({"exclude_modules": "(a+)+"}, "exclude_modules names"),
        ({"layers_to_transform": 0, "layers_pattern": ["(h+)+"]}, "layers_pattern names"),
        ({"layers_to_transform": [-1]}, "layers_to_transform is a list; expected an integer or a list of integers"),
        ({"layers_to_transform": "1"}, "layers_to_transform is '1'"),
        ({"exclude_modules": [1]}, "exclude_modules is a list; expected a text, or a list of texts"),
        ({"target_modules": "fc1", "layers_to_transform": 0}, "no effect where target_modules is a text"),
        ({"target_modules": []}, "target_modules is a list that is empty"),
        ({"target_modules": [f"a{number}" for number in range(5000)]}, "has 5000 names; expected at most 4096"),
        ({"target_modules": "(a|a)" * 50}, "target_modules names"),
    ],
)
def test_a_selection_of_another_kind_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(**changes)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rank_pattern", {"fc1": 0}, "rank_pattern: fc1 is 0; expected an integer from 1"),
        ("rank_pattern", {"fc1": "two"}, "rank_pattern: fc1 is 'two'"),
        ("rank_pattern", ["fc1"], "rank_pattern is .*; expected an object"),
        ("alpha_pattern", {"fc1": "2.5"}, r"alpha_pattern: fc1 is '2\.5'; expected a number"),
        ("alpha_pattern", {"(a+)+$": 4}, "expected the name of a layer, or a regular expression of letters"),
        ("alpha_pattern", {"((fc1": 4}, "expected the name of a layer, or a regular expression of letters"),
        ("use_rslora", "yes", "use_rslora is 'yes'"),
    ],
)
def test_a_pattern_of_another_kind_is_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(**{key: value})


def test_the_scale_of_a_layer_has_a_closed_form() -> None:
    """alpha / r, and alpha / sqrt(r) with rank-stabilised scaling; patterns match the end of a layer's name."""
    layer, patterns = "model.layers.0.mlp.fc1", {"rank_pattern": {"fc1": 16}, "alpha_pattern": {r"0\.mlp\.fc1": 24}}
    assert read().scale(layer) == 2
    assert read(**patterns).scale(layer) == 1.5
    assert read(**patterns, use_rslora=True).scale(layer) == 6
    assert read(**patterns, use_rslora=True).scale("model.layers.1.mlp.fc2") == 4


def test_an_adapter_that_plain_peft_wrote_is_read(phi_dir: Path, tmp_path: Path) -> None:
    """Reference: PEFT's own state, with one A for q, k and v, as a fused layer has it."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM")
    peft: PeftModel = get_peft_model(PhiForCausalLM.from_pretrained(phi_dir), config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_A" in name:
                parameter.copy_(torch.arange(parameter.numel()).view_as(parameter))
            elif "lora_B" in name:
                parameter.normal_()
    peft.save_pretrained(tmp_path, save_embedding_layers=False)
    adapter = read_adapter(tmp_path)
    assert adapter.settings == LoraSettings(4, 8, ("Wqkv",))
    assert adapter.base["base_digest"] == ""
    layer = peft.get_base_model().model.layers[1].self_attn
    expected = torch.cat([getattr(layer, f"{name}_proj").lora_B["default"].weight for name in "qkv"])
    assert torch.equal(adapter.weights["base_model.model.model.layers.1.self_attn.Wqkv.lora_B.weight"], expected)
