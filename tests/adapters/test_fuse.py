"""Adapters that plain PEFT trained on transformers' own Phi, run by the fused model: the logits are PEFT's."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PhiForCausalLM

from lit_phi2.adapters.adapter import Adapter, _log_partial, check_adapter
from lit_phi2.adapters.checkpoint import read_adapter
from lit_phi2.adapters.peft_format import save_adapter
from lit_phi2.errors import InputError
from lit_phi2.model.loading import load_phi2
from lit_phi2.model.lora import add_lora, load_adapter_state_dict, trainable_parameters
from lit_phi2.model.phi2 import packed_forward
from lit_phi2.pretrained import BaseModel

QKV = ["q_proj", "k_proj", "v_proj"]
IDS, POSITIONS = torch.arange(3, 43)[None], torch.arange(40)[None]
# Name -> what PEFT was told; the rank and alpha of the fused layers.
VARIANTS: dict[str, tuple[dict[str, Any], int, int]] = {
    "own A": ({"target_modules": QKV}, 12, 24),
    "with the MLP": ({"target_modules": [*QKV, "fc1", "fc2"]}, 12, 24),
    "dense": ({"target_modules": ["dense"]}, 4, 8),
    "all": ({"target_modules": [*QKV, "dense", "fc1", "fc2"]}, 12, 24),
    "q and v": ({"target_modules": ["q_proj", "v_proj"]}, 8, 16),
    "k": ({"target_modules": ["k_proj", "fc1"]}, 4, 8),
    "long names": ({"target_modules": ["self_attn.v_proj", "mlp.fc2"]}, 4, 8),
    "rank pattern": ({"target_modules": [*QKV, "fc1"], "rank_pattern": {"q_proj": 2, "layers.1.mlp.fc1": 7}}, 10, 10),
    "alpha pattern": ({"target_modules": ["q_proj", "v_proj", "fc2"], "alpha_pattern": {"v_proj": 5, "fc2": 16}}, 8, 8),
    "patterns": (
        {
            "target_modules": [*QKV, "dense", "fc1"],
            "rank_pattern": {r"layers\.0\.mlp\.fc1": 1, "(q|k)_proj": 3},
            "alpha_pattern": {"^model.layers.1.self_attn.q_proj": 7},
        },
        10,
        10,
    ),
    "regex": ({"target_modules": r".*\.(q_proj|fc2)"}, 4, 8),
    "every linear layer": ({"target_modules": "all-linear"}, 12, 24),
    "names without a layer": ({"target_modules": ["Wqkv", "o_proj", "fc1", "fc2"]}, 4, 8),
    "alpha 2.5": ({"target_modules": [*QKV, "fc1"], "lora_alpha": 2.5}, 12, 12),
    "alpha below 0": ({"target_modules": ["q_proj", "fc1"], "lora_alpha": -8}, 4, 4),
    "alpha 0.3 of one layer": ({"target_modules": ["fc1", "fc2"], "alpha_pattern": {r"layers\.1\..*fc2": 0.3}}, 4, 4),
    "rank-stabilised, alpha 2.5": ({"target_modules": ["fc1", "dense"], "use_rslora": True, "lora_alpha": 2.5}, 4, 5),
    "rank-stabilised": ({"target_modules": [*QKV, "fc1"], "use_rslora": True}, 12, 48),
    "rank-stabilised, odd": ({"target_modules": ["q_proj", "fc1"], "use_rslora": True, "r": 3, "lora_alpha": 5}, 3, 5),
    "all at once": (
        {
            "target_modules": ["v_proj", "q_proj", "dense", "fc2"],
            "use_rslora": True,
            "rank_pattern": {"v_proj": 5},
            "alpha_pattern": {"dense": 3},
        },
        9,
        9,
    ),
}


# Name -> what PEFT was told; the layers that then have an adapter, of 2 blocks of as many kinds.
PARTIAL: dict[str, tuple[dict[str, Any], str]] = {
    "one block": ({"target_modules": [*QKV, "fc1"], "layers_to_transform": [1]}, "2 of the 4"),
    "one block by number": ({"target_modules": ["v_proj", "fc2"], "layers_to_transform": 0}, "2 of the 4"),
    "list of blocks": (
        {"target_modules": ["fc1"], "layers_to_transform": [0, 7], "layers_pattern": "layers"},
        "1 of the 2",
    ),
    "named layers": (
        {"target_modules": ["layers.0.self_attn.q_proj", "1.self_attn.k_proj", "1.mlp.fc1"]},
        "3 of the 4",
    ),
    "regex": ({"target_modules": r"model\.layers\.1\.(self_attn|mlp)\.(?:k_proj|fc1)"}, "2 of the 4"),
    "excluded layer": ({"target_modules": [*QKV, "fc1"], "exclude_modules": ["layers.0.mlp.fc1"]}, "3 of the 4"),
    "excluded by regex": (
        {"target_modules": ["q_proj", "fc2"], "exclude_modules": r".*layers\.1\.mlp.*"},
        "3 of the 4",
    ),
    "excluded, ranks": (
        {"target_modules": "all-linear", "exclude_modules": ["0.mlp.fc1", "dense"], "rank_pattern": {"fc2": 2}},
        "5 of the 6",
    ),
}


def peft_adapter(phi_dir: Path, folder: Path, **settings: Any) -> Tensor:
    """Write an adapter with random A and B as PEFT does, and return PEFT's own logits."""
    config = LoraConfig(**({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | settings))
    peft: PeftModel = get_peft_model(PhiForCausalLM.from_pretrained(phi_dir), config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        peft.save_pretrained(folder, save_embedding_layers=False)
        logits = peft(input_ids=IDS).logits
        with peft.disable_adapter():  # the update is not lost in the tolerance
            assert (logits - peft(input_ids=IDS).logits).abs().max() > 0.02
        return logits


def logits_of(base: BaseModel, adapter: Adapter) -> Tensor:
    """Of the fused model, in float32."""
    adapter = check_adapter(adapter, adapter.settings, base, source="adapter")
    phi = add_lora(load_phi2(base, torch.float32), adapter.settings, dropout=0.0)
    load_adapter_state_dict(phi, adapter.weights, source="adapter")
    model = phi.eval().get_base_model()
    with torch.no_grad():
        return model.lm_head(packed_forward(model, IDS, POSITIONS))


@pytest.mark.parametrize("name", VARIANTS)
def test_an_adapter_of_plain_peft_has_peft_s_logits(
    name: str, phi_dir: Path, base: BaseModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Reference: PEFT on transformers' own Phi; logits of magnitude 3, so 1e-5 is a few roundings of float32."""
    caplog.set_level(logging.INFO, "lit_phi2")
    settings, rank, alpha = VARIANTS[name]
    expected = peft_adapter(phi_dir, tmp_path / "peft", **settings)
    adapter = read_adapter(tmp_path / "peft")
    assert (adapter.settings.lora_r, adapter.settings.lora_alpha) == (rank, alpha)
    logits = logits_of(base, adapter)
    difference = (logits - expected).abs().max().item()
    assert difference < 1e-5
    plain = (rank, alpha) == (settings.get("r", 4), settings.get("lora_alpha", 8))
    assert (f"it has rank {rank} and alpha {alpha}" in caplog.text) != plain
    save_adapter(adapter, tmp_path / "again")  # as its own export, in which q, k and v share an A
    again = read_adapter(tmp_path / "again").weights
    assert all(torch.equal(again[key], weight) for key, weight in adapter.weights.items())


@pytest.mark.parametrize("name", PARTIAL)
def test_an_adapter_of_some_layers_has_peft_s_logits(
    name: str, phi_dir: Path, base: BaseModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Reference: PEFT. A layer without an adapter gets one whose B is zero, and its export has PEFT's logits, too."""
    caplog.set_level(logging.INFO, "lit_phi2")
    settings, layers = PARTIAL[name]
    expected = peft_adapter(phi_dir, tmp_path / "peft", **settings)
    adapter = read_adapter(tmp_path / "peft")
    assert (logits_of(base, adapter) - expected).abs().max() < 1e-5
    _log_partial.cache_clear()
    complete = check_adapter(adapter, adapter.settings, base, source="x")
    assert f"x: adapts {layers} layers of these kinds; the others do not change" in caplog.text
    save_adapter(complete, tmp_path / "again")
    again = PeftModel.from_pretrained(PhiForCausalLM.from_pretrained(phi_dir), str(tmp_path / "again")).eval()
    with torch.no_grad():
        assert (again(input_ids=IDS).logits - expected).abs().max() < 1e-5


def test_every_rank_of_a_layer_that_is_added_learns(phi_dir: Path, base: BaseModel, tmp_path: Path) -> None:
    """With A and B zero neither would ever have a gradient; A is the same at each reading."""
    peft_adapter(phi_dir, tmp_path, target_modules=["fc1"], layers_to_transform=[1])
    adapters = [
        check_adapter(a, a.settings, base, source="a") for a in (read_adapter(tmp_path), read_adapter(tmp_path))
    ]
    a, b = (f"base_model.model.model.layers.0.mlp.fc1.lora_{x}.weight" for x in "AB")
    assert torch.equal(adapters[0].weights[a], adapters[1].weights[a])
    assert adapters[0].weights[a].abs().sum(1).min() > 0
    assert not adapters[0].weights[b].any()


def test_q_k_and_v_apart_are_blocks_of_the_fused_layer(phi_dir: Path, tmp_path: Path) -> None:
    """By hand: A stacked, B on the diagonal, and nothing computed."""
    peft_adapter(phi_dir, tmp_path, target_modules=QKV)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.self_attn"
    a, b = ([saved[f"{prefix}.{name}.lora_{kind}.weight"] for name in QKV] for kind in "AB")
    weights = read_adapter(tmp_path).weights
    assert torch.equal(weights[f"{prefix}.Wqkv.lora_A.weight"], torch.cat(a))
    assert torch.equal(weights[f"{prefix}.Wqkv.lora_B.weight"], torch.block_diag(*b))


def test_every_rank_of_a_padded_adapter_learns(phi_dir: Path, base: BaseModel, tmp_path: Path) -> None:
    """Rank 2 of fc1 becomes rank 8; with A and B zero neither would ever have a gradient."""
    peft_adapter(phi_dir, tmp_path, target_modules=["fc1", "fc2"], rank_pattern={"fc1": 2, "fc2": 8})
    adapter = read_adapter(tmp_path)
    assert all(torch.equal(read_adapter(tmp_path).weights[name], weight) for name, weight in adapter.weights.items())
    phi = add_lora(load_phi2(base, torch.float32), adapter.settings, dropout=0.0)
    load_adapter_state_dict(phi, adapter.weights, source="adapter")
    model = phi.get_base_model()
    packed_forward(model, IDS, POSITIONS).square().sum().backward()
    for name, parameter in trainable_parameters(phi).items():
        if "fc1.lora_B" in name:
            assert not parameter[:, 2:].any()
            assert parameter.grad[:, 2:].abs().sum(0).min() > 0


def test_training_on_asks_for_the_fused_rank(phi_dir: Path, base: BaseModel, tmp_path: Path) -> None:
    peft_adapter(phi_dir, tmp_path, target_modules=QKV)
    adapter = read_adapter(tmp_path)
    with pytest.raises(InputError, match=r"has lora_r 12, but model\.lora_r is 4; make them equal"):
        check_adapter(adapter, type(adapter.settings)(4, 8, ("Wqkv",)), base, source="adapter")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.0.self_attn.q_proj.lora_B": None}, r"has no weight '.*layers\.0\.self_attn\.q_proj\.lora_B\.weight'"),
        ({"layers.0.self_attn.q_proj": None}, r"has no weight '.*0\.self_attn\.q_proj\.lora_A"),
        ({"layers.0": None}, r"has no weight '.*layers\.0\.self_attn\.q_proj\.lora_A"),
        ({"k_proj": None}, r"has no weight '.*layers\.0\.self_attn\.k_proj\.lora_A"),
        ({"": None}, "has no weights of LoRA"),
        ({"layers.1.self_attn.v_proj.lora_A": torch.zeros(5, 64)}, r"has shape \(5, 64\); expected \(4, 64\)"),
        ({"layers.1.self_attn.v_proj.lora_A": torch.zeros(4, 63)}, "weights of different shapes"),
        ({"layers.1.self_attn.v_proj.lora_A": torch.zeros(4, 64).int()}, r"is torch\.int32; expected floating-point"),
        ({"layers.1.self_attn.v_proj.lora_A": torch.zeros(4)}, r"has shape \(4,\); expected \("),
    ],
)
def test_a_damaged_adapter_is_refused(
    change: dict[str, Tensor | None], message: str, phi_dir: Path, tmp_path: Path
) -> None:
    peft_adapter(phi_dir, tmp_path, target_modules=QKV)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    for part, value in change.items():
        for name in [name for name in weights if part in name]:
            del weights[name]
            if value is not None:
                weights[name] = value
    save_file(weights, file)
    with pytest.raises(InputError, match=message):
        read_adapter(tmp_path)


def test_a_small_file_cannot_make_its_reader_pad_without_end(phi_dir: Path, tmp_path: Path) -> None:
    """One layer of rank 600 beside others of rank 1 would make each of those 600 times as large."""
    peft_adapter(phi_dir, tmp_path, target_modules=["fc1", "fc2"], r=1, rank_pattern={"0.mlp.fc1": 600})
    with pytest.raises(InputError, match=r"has ranks from 1 to 600; the largest may be 256 times the smallest"):
        read_adapter(tmp_path)
