"""Merged folders: weights against PEFT's own merge, and the files as other programs read them."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from export.support import claims_prompts
from lit_phi2.adapters.adapter import Adapter
from lit_phi2.adapters.peft_format import save_adapter
from lit_phi2.data.encode import tokenize
from lit_phi2.data.prompts import format_prompt
from lit_phi2.errors import InputError
from lit_phi2.export import merged
from lit_phi2.export.card import CardFacts
from lit_phi2.export.exporter import export, plan_export
from lit_phi2.export.weights import ModelWeights, lora_pairs
from lit_phi2.pretrained import BaseModel, load_tokenizer, resolve_base_model


def export_merged(adapter: Adapter | None, base: BaseModel, folder: Path, dtype: str) -> Path:
    export(plan_export(adapter, base, folder, format="merged", dtype=dtype, source="adapter"), None, CardFacts())
    return folder


def test_merged_weights_are_those_that_peft_merges(export_base: BaseModel, adapter: Adapter, tmp_path: Path) -> None:
    """To float32's rounding: PEFT computes B A and then adds it, in another order."""
    save_adapter(adapter, tmp_path / "peft")
    model = AutoModelForCausalLM.from_pretrained(export_base.folder, dtype=torch.float32)
    expected = PeftModel.from_pretrained(model, str(tmp_path / "peft")).merge_and_unload().state_dict()
    weights = load_file(export_merged(adapter, export_base, tmp_path / "out", "float32") / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_merged_weights_are_rounded_once(dtype: str, export_base: BaseModel, adapter: Adapter, tmp_path: Path) -> None:
    """Reference: the sum in float64. A second rounding would be off by more than half a unit in the last place.

    Half a step of float16 below its normal values, and float32's rounding of the sum, come on top.
    """
    folder = export_merged(adapter, export_base, tmp_path / "out", dtype)
    weights = load_file(folder / "model.safetensors")
    base = load_file(export_base.folder / "model.safetensors")
    half_unit = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    for layer, pair in lora_pairs(adapter).items():
        name = f"{layer}.weight"
        exact = base[name].double() + pair.scale * (pair.b.double() @ pair.a.double())
        unit = torch.exp2(exact.abs().log2().floor())
        assert ((weights[name].double() - exact).abs() <= half_unit * unit + 1e-7).all()
        assert weights[name].dtype == getattr(torch, dtype)


def test_shards_and_their_index_load(
    export_base: BaseModel, adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_file(export_merged(adapter, export_base, tmp_path / "whole", "float32") / "model.safetensors")
    monkeypatch.setattr(merged, "SHARD_BYTES", 3_000_000)
    folder = export_merged(adapter, export_base, tmp_path / "out", "float32")
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert len(shards) > 2
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in whole.items())


def test_the_config_is_read_by_old_and_new_programs(tiny_base: BaseModel, tmp_path: Path) -> None:
    """Half of a head is rotated: at the top level for transformers 4, vLLM and mlx-lm, nested for transformers 5."""
    folder = export_merged(None, tiny_base, tmp_path / "out", "bfloat16")
    config = json.loads((folder / "config.json").read_text())
    assert (config["partial_rotary_factor"], config["rope_theta"]) == (0.5, 10000.0)
    assert config["rope_parameters"]["partial_rotary_factor"] == 0.5
    assert config["architectures"] == ["PhiForCausalLM"]
    assert (config["dtype"], config["torch_dtype"]) == ("bfloat16", "bfloat16")
    loaded, original = AutoConfig.from_pretrained(folder), AutoConfig.from_pretrained(tiny_base.folder)
    for key in ("rope_parameters", "hidden_act", "layer_norm_eps", "eos_token_id", "max_position_embeddings"):
        assert getattr(loaded, key) == getattr(original, key), key
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 0


def test_code_in_a_base_is_not_passed_on(export_base: BaseModel, tmp_path: Path) -> None:
    source = tmp_path / "base"
    source.mkdir()
    for file in export_base.folder.iterdir():
        if not file.name.startswith("."):
            (source / file.name).write_bytes(file.read_bytes())
    for name in ("config.json", "tokenizer_config.json"):
        config = json.loads((source / name).read_text())
        (source / name).write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    folder = export_merged(None, resolve_base_model(str(source)), tmp_path / "out", "bfloat16")
    assert not any("auto_map" in file.read_text() for file in folder.glob("*.json"))


def test_the_chat_template_gives_the_trained_prompt(tiny_base: BaseModel, tmp_path: Path) -> None:
    """Reference: the ids that training sees, for every packaged test record."""
    folder = export_merged(None, tiny_base, tmp_path / "out", "bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = claims_prompts("test")
    for prompt, ids in zip(prompts, tokenize(load_tokenizer(tiny_base), prompts), strict=True):
        content = prompt.removeprefix("### Instruction:\n").removesuffix("\n\n### Response:\n")
        chat = [{"role": "user", "content": content}]
        rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert rendered == ids


def test_the_chat_template_ends_a_response_with_eos(tiny_base: BaseModel, tmp_path: Path) -> None:
    folder = export_merged(None, tiny_base, tmp_path / "out", "bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Code 97."},
    ]
    expected = format_prompt("Be short.\n\nWhy?") + "Code 97.<|endoftext|>"
    assert tokenizer.apply_chat_template(chat, tokenize=False) == expected


def test_a_value_too_large_for_float16_is_refused(export_base: BaseModel, adapter: Adapter, tmp_path: Path) -> None:
    for name, weight in adapter.weights.items():
        if "fc1.lora_B" in name:
            adapter = Adapter(adapter.weights | {name: weight * 1e7}, adapter.settings, adapter.base, 1)
    with pytest.raises(InputError, match=r"--dtype float16: .*fc1.* beyond"):
        export_merged(adapter, export_base, tmp_path / "out", "float16")
    assert not (tmp_path / "out").exists()


def test_weights_are_read_one_at_a_time(export_base: BaseModel, adapter: Adapter) -> None:
    """The tensors of the base that no adapter changes are those of the file, unrounded."""
    base = load_file(export_base.folder / "model.safetensors")
    layers = lora_pairs(adapter)
    for name, weight in ModelWeights(export_base, adapter):
        if name.removesuffix(".weight") not in layers:
            assert torch.equal(weight, base[name])
