"""The layers that decoding calls: merged copies where memory and tokens allow, else the model's own."""

import logging
from pathlib import Path

import psutil
import pytest
import torch

from helpers import new_module
from lit_phi2.generation.engine import generate
from lit_phi2.generation.weights import prepare_weights

PROMPTS = [[3, 4, 5, 6, 7], [8, 9], [11] * 30]


@pytest.mark.parametrize(
    ("available", "num_tokens", "message"),
    [
        (10**9, 100, "the adapter is merged into a copy of its layers"),
        (10**5, 100, "the adapter is added in every pass, because a copy of 0 MB does not fit the memory"),
        (10**9, 99, "the adapter is added in every pass, because few tokens are expected"),
    ],
)
def test_one_line_says_how_the_adapter_is_applied(
    phi_dir: Path,
    available: int,
    num_tokens: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The tokens are those of plenty of memory either way, which test_engine.py compares with transformers."""
    module = new_module(phi_dir)
    expected = generate(module.fused_phi, PROMPTS, eos_token_id=-1, max_new_tokens=100)
    memory = psutil.virtual_memory()._replace(available=available)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="lit_phi2"):
        completions = generate(module.fused_phi, PROMPTS, eos_token_id=-1, max_new_tokens=num_tokens)
    assert [record.getMessage() for record in caplog.records] == [f"decoding: {message}"]
    assert [each.ids[:12] for each in completions] == [each.ids[:12] for each in expected]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_rows", [1, 8, 32])
def test_a_merged_layer_multiplies_by_the_sum(phi_dir: Path, dtype: str, num_rows: int) -> None:
    """Reference: W + scale B A in float64. bfloat16 has 8 bits, so errors up to 2^-8 of the largest output."""
    module = new_module(phi_dir, dtype=dtype)
    weights = prepare_weights(module.fused_phi, use_adapter=True, num_rows=num_rows, num_passes=None)
    layer = module.fused_phi.model.layers[1].mlp.fc1
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    merged = layer.base_layer.weight.double() + layer.scaling["default"] * b @ a
    x = torch.randn(num_rows, 64, generator=torch.Generator().manual_seed(0)).to(weights.dtype)
    bias = layer.base_layer.bias.double()
    expected, base = x.double() @ merged.t() + bias, x.double() @ layer.base_layer.weight.double().t() + bias
    with torch.inference_mode():
        output = weights.blocks[1].mlp.fc1(x).double()
    tolerance = {"float32": 1e-5, "bfloat16": 2.0**-7}[dtype] * expected.abs().max().item()
    torch.testing.assert_close(output, expected, rtol=0, atol=tolerance)
    assert (expected - base).abs().max() > tolerance, "an adapter without effect would prove nothing"
