"""scripts/quantization_check.py on a random Phi of two layers and on the tiny base."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from helpers import relative_difference
from lit_phi2.model.loading import load_phi2
from lit_phi2.model.phi2 import packed_forward
from lit_phi2.pretrained import resolve_base_model
from quantization_check import gradients, outliers, plant


def test_gradients_in_8_bits_point_where_those_of_float32_do() -> None:
    found = gradients(resolve_base_model("tiny"), None, 2)
    assert 0.99 < found["least"] <= found["5 %"] <= found["median"] < 1


def test_planted_channels_change_the_weights_and_not_the_model(tmp_path: Path) -> None:
    """Reference: the base itself, in float32."""
    base = resolve_base_model("tiny")
    planted = resolve_base_model(str(plant(base.folder, tmp_path / "base", 100.0, 6)))
    name = "model.layers.5.input_layernorm.weight"
    weights = [load_file(each.folder / "model.safetensors")[name].float() for each in (base, planted)]
    assert (weights[1] / weights[0]).max().item() > 99
    ids, positions = torch.arange(1, 60)[None], torch.arange(59)[None]
    with torch.no_grad():
        hidden = [packed_forward(load_phi2(each, torch.float32), ids, positions) for each in (base, planted)]
    assert relative_difference(hidden[1], hidden[0]) < 1e-3  # dividing and multiplying by 100 rounds


def test_outlier_columns_win_back_what_8_bits_lose() -> None:
    rows = outliers(4)  # so few that the loss is 0.1, and rounding of the rest changes it by a percent
    assert len(rows) == 4
    assert all(abs(quantized / whole - 1) < 0.03 for whole, _, quantized in rows)
    assert max(abs(careless / whole - 1) for whole, careless, _ in rows) > 0.3
