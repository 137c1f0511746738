"""MLX adapters: their layout, what is imported again, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from export.support import random_adapter
from lit_phi2.adapters.adapter import Adapter
from lit_phi2.errors import InputError
from lit_phi2.export.card import CardFacts
from lit_phi2.export.exporter import export, plan_export
from lit_phi2.export.imports import read_mlx_adapter
from lit_phi2.export.mlx import write_mlx_adapter
from lit_phi2.model.lora import LoraSettings
from lit_phi2.pretrained import BaseModel, resolve_base_model


def test_an_mlx_adapter_is_transposed(adapter: Adapter, tmp_path: Path) -> None:
    """By hand: mlx-lm computes x A B with A (in, r) and B (r, out), and multiplies by the scale in its config."""
    write_mlx_adapter(adapter, 2, tmp_path)
    tensors = load_file(tmp_path / "adapters.safetensors")
    fc1 = {x: adapter.weights[f"base_model.model.model.layers.1.mlp.fc1.lora_{x}.weight"].numpy() for x in "AB"}
    assert np.array_equal(tensors["model.layers.1.mlp.fc1.lora_a"], fc1["A"].T)
    assert np.array_equal(tensors["model.layers.1.mlp.fc1.lora_b"], fc1["B"].T)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_parameters"]["scale"] == 2.0
    projections = [f"self_attn.{name}" for name in ("dense", "k_proj", "q_proj", "v_proj")]
    assert config["lora_parameters"]["keys"] == ["mlp.fc1", "mlp.fc2", *projections]


@pytest.mark.parametrize(("rank", "alpha", "use_rslora"), [(4, 8, False), (4, 5, False), (4, 8, True), (3, 5, True)])
def test_an_mlx_adapter_imports_as_itself(
    rank: int, alpha: int, use_rslora: bool, export_base: BaseModel, tmp_path: Path
) -> None:
    """Bit for bit at any scale, which is a number in its config."""
    adapter = random_adapter(export_base, LoraSettings(rank, alpha, ("Wqkv", "fc2"), use_rslora))
    write_mlx_adapter(adapter, 2, tmp_path)
    imported = read_mlx_adapter(tmp_path)
    assert (imported.settings, imported.base) == (adapter.settings, adapter.base)
    assert imported.weights.keys() == adapter.weights.keys()
    assert all(torch.equal(weight, adapter.weights[name]) for name, weight in imported.weights.items())


def test_a_damaged_mlx_adapter_is_refused(adapter: Adapter, tmp_path: Path) -> None:
    write_mlx_adapter(adapter, 2, tmp_path)
    tensors = load_file(tmp_path / "adapters.safetensors")
    name = "model.layers.0.self_attn.k_proj.lora_b"
    for damaged, message in (
        (tensors | {name: tensors[name] * 2}, "is damaged"),
        (tensors | {name: tensors[name][:, :7].copy()}, "."),
        ({key: value for key, value in tensors.items() if key != name}, "has no weight"),
        (tensors | {"stranger": tensors[name]}, "'stranger', which no adapter has"),
    ):
        save_file(damaged, tmp_path / "adapters.safetensors")
        with pytest.raises(InputError, match=message):
            read_mlx_adapter(tmp_path)


def test_an_mlx_adapter_of_another_tool_is_refused(adapter: Adapter, tmp_path: Path) -> None:
    write_mlx_adapter(adapter, 2, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for value, message in (
        ({key: value for key, value in config.items() if key != "lit_phi2"}, "only an MLX adapter that lit_phi2 wrote"),
        (config | {"lit_phi2": {**config["lit_phi2"], "lora_r": "two"}}, "lora_r is 'two'"),
        ([], "holds a list"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(value))
        with pytest.raises(InputError, match=message):
            read_mlx_adapter(tmp_path)


def test_a_config_that_leaves_out_heads_is_completed(export_base: BaseModel, adapter: Adapter, tmp_path: Path) -> None:
    """mlx-lm takes 32 key and value heads where config.json has no number; the base has 4."""
    shutil.copytree(export_base.folder, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config |= {"partial_rotary_factor": 0.5, "rope_theta": 10000.0}
    del config["num_key_value_heads"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    base = resolve_base_model(str(tmp_path / "base"))
    adapter = replace(adapter, base=base.fingerprint())
    export(plan_export(adapter, base, tmp_path / "out", format="mlx", dtype=None, source="a"), None, CardFacts())
    assert json.loads((tmp_path / "out" / "base" / "config.json").read_text())["num_key_value_heads"] == 4


def test_a_base_that_mlx_reads_wrong_is_copied(tiny_base: BaseModel, tiny_adapter: Adapter, tmp_path: Path) -> None:
    """mlx-lm reads the top level of config.json, where the tiny base has no rope settings; the copy has, unrounded."""
    plan = plan_export(tiny_adapter, tiny_base, tmp_path / "out", format="mlx", dtype=None, source="adapter")
    export(plan, None, CardFacts())
    assert "partial_rotary_factor" not in json.loads((tiny_base.folder / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "base" / "config.json").read_text())["partial_rotary_factor"] == 0.5
    from safetensors.torch import load_file as load_torch

    original = load_torch(tiny_base.folder / "model.safetensors")
    copy = load_torch(tmp_path / "out" / "base" / "model.safetensors")
    assert all(torch.equal(weight, copy[name]) for name, weight in original.items())
