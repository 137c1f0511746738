"""The error of 8 bits, measured on records: outlier channels are found, a layer that loses too much is left alone."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers import new_module, relative_difference
from lit_phi2.model import calibration
from lit_phi2.model.calibration import apply_table, calibrate, describe_table, format_table
from lit_phi2.model.linear import FrozenLinear
from lit_phi2.model.loading import frozen_linears, load_phi2, read_weight
from lit_phi2.model.loss import causal_lm_loss
from lit_phi2.model.phi2 import FusedPhiForCausalLM, packed_forward
from lit_phi2.model.quantization import Int8Linear
from lit_phi2.pretrained import resolve_base_model

IDS = torch.randint(1, 500, (1, 200), generator=torch.Generator().manual_seed(0))
Planted = Callable[[float, int], Path]


@pytest.fixture
def planted(phi_dir: Path, tmp_path: Path) -> Planted:
    """A base that computes the same in floating point: a channel of the normalized input is larger by a factor, and
    the weights that read it are smaller by it."""

    def plant(factor: float, num_layers: int) -> Path:
        folder = tmp_path / "planted"
        shutil.copytree(phi_dir, folder)
        weights = load_file(folder / "model.safetensors")
        for layer in range(num_layers):
            prefix = f"model.layers.{layer}."
            for name in ("weight", "bias"):
                weights[f"{prefix}input_layernorm.{name}"][[7, 40]] *= factor
            for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"):
                weights[f"{prefix}{name}.weight"][:, [7, 40]] /= factor
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return plant


@torch.no_grad()
def hidden_of(model: FusedPhiForCausalLM) -> Tensor:
    return packed_forward(model, IDS, torch.arange(IDS.shape[1])[None])


def loss_of(model: FusedPhiForCausalLM) -> float:
    hidden = hidden_of(model)
    with torch.no_grad():
        loss = causal_lm_loss(hidden, IDS, model.lm_head)
    return loss.nats.item() / loss.num_tokens.item()


@pytest.mark.parametrize("factor", [20.0, 100.0])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_planted_outliers_change_the_loss_by_less_than_one_percent(
    factor: float, num_layers: int, planted: Planted
) -> None:
    """Reference: the base in float32. Without the columns hidden states lose several times as much."""
    base = resolve_base_model(str(planted(factor, num_layers)))
    whole, model = load_phi2(base, torch.float32), load_phi2(base, torch.float32, quantize=True)
    careless = relative_difference(hidden_of(model), hidden_of(whole))
    table = calibrate(model, base, IDS.tolist())
    for layer in range(num_layers):
        for name in ("self_attn.Wqkv", "mlp.fc1"):
            found = table[f"model.layers.{layer}.{name}"]
            assert {7, 40} <= set(found["columns"])
            assert found["error"] < 0.03
    assert loss_of(model) == pytest.approx(loss_of(whole), rel=0.01)
    assert careless > 2 * relative_difference(hidden_of(model), hidden_of(whole))


def test_ordinary_layers_have_no_outlier_columns(phi_dir: Path) -> None:
    base = resolve_base_model(str(phi_dir))
    model = load_phi2(base, torch.float32, quantize=True)
    table = calibrate(model, base, IDS.tolist())
    assert table.keys() == frozen_linears(model).keys()
    assert all(0.001 < found["error"] < 0.03 and not found["columns"] for found in table.values())
    assert describe_table(table).startswith("products of 9 layers lose at most ")
    assert len(format_table(table).splitlines()) == 10


def test_a_layer_that_loses_too_much_gets_its_weight_back(phi_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the weights in the files, and the loss of the base in float32."""
    monkeypatch.setattr(calibration, "COLUMNS_FROM", 0.0)
    monkeypatch.setattr(calibration, "MAX_ERROR", 0.0)
    base = resolve_base_model(str(phi_dir))
    model = load_phi2(base, torch.float32, quantize=True)
    table = calibrate(model, base, IDS.tolist())
    whole = load_phi2(base, torch.float32)
    assert not any(found["is_quantized"] for found in table.values())
    assert "left in the compute dtype: model.layers.0.self_attn.Wqkv, " in describe_table(table)
    for name, layer in frozen_linears(model).items():
        assert type(layer) is FrozenLinear
        assert torch.equal(layer.weight, read_weight(base, name))
    assert loss_of(model) == loss_of(whole)


def test_a_table_gives_the_model_that_it_was_measured_on(planted: Planted) -> None:
    base = resolve_base_model(str(planted(100.0, 1)))
    measured = load_phi2(base, torch.float32, quantize=True)
    table = calibrate(measured, base, IDS.tolist())
    table["model.layers.1.mlp.fc2"]["is_quantized"] = False
    loaded = load_phi2(base, torch.float32, quantize=True)
    apply_table(measured, base, table)
    apply_table(loaded, base, table)
    assert isinstance(frozen_linears(loaded)["model.layers.1.mlp.fc1"], Int8Linear)
    assert type(frozen_linears(loaded)["model.layers.1.mlp.fc2"]) is FrozenLinear
    assert loss_of(loaded) == loss_of(measured)


def test_a_module_reports_and_keeps_the_table(phi_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    module = new_module(phi_dir, quantization="int8")
    assert module.quantization_table is not None
    assert module.trained_adapter().quantization == module.quantization_table
    assert "model.quantization: products of 9 layers lose at most" in caplog.text
    assert new_module(phi_dir).trained_adapter().quantization is None
