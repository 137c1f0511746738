"""Frozen weights in 8 bits: exact sums, rounding within its bound, and the same bits beside any others."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from helpers import new_module, relative_difference
from lit_phi2.errors import InputError
from lit_phi2.model import phi2, quantization
from lit_phi2.model.linear import FrozenLinear
from lit_phi2.model.loading import load_phi2
from lit_phi2.model.lora import FusedLoraLinear
from lit_phi2.model.loss import causal_lm_loss
from lit_phi2.model.phi2 import packed_forward
from lit_phi2.model.quantization import (
    Int8Linear,
    dequantize,
    int8_product,
    quantize_into,
    quantize_rows,
    set_outliers,
    use_int8,
)
from lit_phi2.pretrained import resolve_base_model

NUM_IN, NUM_OUT = 130, 70


def new_layer(weight: Tensor, bias: Tensor) -> Int8Linear:
    layer = FrozenLinear(weight.shape[1], weight.shape[0], device="meta")
    use_int8(layer)
    layer.to_empty(device="cpu")
    assert isinstance(layer, Int8Linear)
    quantize_into(weight, layer.weight.data, layer.weight_scale)
    layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


@pytest.fixture
def layer() -> Int8Linear:
    torch.manual_seed(0)
    return new_layer(torch.randn(NUM_OUT, NUM_IN), torch.randn(NUM_OUT))


@pytest.fixture(params=[True, False], ids=["int8 products", "blocks"])
def has_fast_int8(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both kinds of machine, seven rows of a weight in three blocks, the last of them short."""
    monkeypatch.setattr(quantization, "has_fast_int8", lambda device: request.param)
    monkeypatch.setattr(quantization, "CHUNK_NUMEL", 31 * NUM_IN)
    monkeypatch.setattr(quantization, "BLOCK_ROWS", 4)
    return bool(request.param)


def test_weights_are_off_by_at_most_half_a_step(layer: Int8Linear) -> None:
    """Reference: the definition of rounding to the nearest of 255 numbers up to the largest of each row."""
    torch.manual_seed(0)
    weight = torch.randn(NUM_OUT, NUM_IN)
    step = weight.abs().amax(1) / 127
    torch.testing.assert_close(layer.weight_scale, step)
    assert layer.weight.dtype == torch.int8
    assert layer.weight.abs().max() == 127
    error = (layer.rows(slice(None)) - weight).abs() / step[:, None]
    assert 0.49 < error.max() <= 0.5 + 1e-4


def test_sums_of_int8_products_are_exact(layer: Int8Linear) -> None:
    """Reference: int64 arithmetic. Rows of x are whole numbers times a power of two, so nothing is rounded."""
    values = torch.randint(-127, 128, (9, NUM_IN))
    values[:, 0] = 127
    result = int8_product(values * 0.25, layer.weight.t())
    expected = values @ layer.weight.t().to(torch.int64)
    assert torch.equal(result, expected.float() * 0.25)


def test_a_product_is_within_the_bound_of_rounding(layer: Int8Linear, has_fast_int8: bool) -> None:
    """Reference: float64 on the dequantized weights. An input is off by at most half a step of its row."""
    x, lora_x, lora_b = torch.randn(9, NUM_IN), torch.randn(9, 2), torch.randn(2, NUM_OUT)
    weight = layer.rows(slice(None)).double()
    expected = x.double() @ weight.t() + layer.bias.double() + 0.3 * lora_x.double() @ lora_b.double()
    error = (layer.matmul(x, lora_x=lora_x, lora_b=lora_b, scale=0.3).double() - expected).abs()
    bound = x.abs().amax(1, keepdim=True).double() / 254 * weight.abs().sum(1) if has_fast_int8 else 0.0
    assert (error <= bound + 1e-4).all()
    assert relative_difference(expected + error, expected) < (0.02 if has_fast_int8 else 1e-6)


def test_a_gradient_is_within_the_bound_of_rounding(layer: Int8Linear, has_fast_int8: bool) -> None:
    """Reference: float64 on the dequantized weights. A gradient is rounded after W's scales are multiplied in."""
    x = torch.randn(9, NUM_IN, requires_grad=True)
    grad = torch.randn(9, NUM_OUT)
    layer(x).backward(grad)
    assert x.grad is not None
    weight = layer.rows(slice(None)).double()
    error = (x.grad.double() - grad.double() @ weight).abs()
    scaled = grad.double() * layer.weight_scale
    bound = scaled.abs().amax(1, keepdim=True) / 254 * layer.weight.abs().sum(0).double() if has_fast_int8 else 0.0
    assert (error <= bound + 1e-4).all()


def test_two_terms_keep_the_tail_of_a_softmax(layer: Int8Linear) -> None:
    """Reference: float64. One token has nearly all probability; the others vanish in 8 bits, and matter together."""
    grad = torch.full((1, NUM_OUT), 0.001)
    grad[0, 0] = 1.0
    expected = grad.double() @ layer.rows(slice(None)).double()
    grad = grad / layer.weight_scale  # matmul_t multiplies the scales in
    expected = grad.double() @ layer.rows(slice(None)).double()
    one_term = relative_difference(layer.matmul_t(grad).double(), expected)
    layer.grad_terms = 2
    assert relative_difference(layer.matmul_t(grad).double(), expected) < 1e-4
    assert one_term > 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_beside_any_others(layer: Int8Linear, dtype: torch.dtype) -> None:
    x, grad = torch.randn(40, NUM_IN, dtype=dtype), torch.randn(40, NUM_OUT, dtype=dtype)
    outputs, gradients = layer.matmul(x), layer.matmul_t(grad)
    assert outputs.dtype == gradients.dtype == dtype
    for row in range(40):
        assert torch.equal(layer.matmul(x[row : row + 1])[0], outputs[row])
        assert torch.equal(layer.matmul_t(grad[row : row + 1])[0], gradients[row])


def test_some_features_are_those_of_all(layer: Int8Linear, has_fast_int8: bool) -> None:
    x, features = torch.randn(5, NUM_IN), slice(20, 50)
    expected = layer.matmul(x)[:, features] - layer.bias[features]
    torch.testing.assert_close(layer.matmul(x, features=features, use_bias=False), expected, rtol=0, atol=1e-5)
    grad = torch.zeros(5, NUM_OUT)
    grad[:, features] = torch.randn(5, 30)
    torch.testing.assert_close(layer.matmul_t(grad[:, features], features=features), layer.matmul_t(grad))


@pytest.mark.parametrize("factor", [20.0, 100.0])
def test_outlier_columns_keep_the_bits_of_the_others(layer: Int8Linear, factor: float) -> None:
    """Reference: float64 on the weights before they were rounded. Where inputs are large, weights are small."""
    x, weight, grad = torch.randn(50, NUM_IN), torch.randn(NUM_OUT, NUM_IN), torch.randn(50, NUM_OUT)
    x[:, [3, 77]] *= factor
    weight[:, [3, 77]] /= factor
    layer = new_layer(weight, layer.bias)
    expected = x.double() @ weight.double().t() + layer.bias.double()
    without = relative_difference(layer.matmul(x).double(), expected)
    set_outliers(layer, [3, 77], weight)
    assert relative_difference(layer.matmul(x).double(), expected) < 0.015 < without / 3
    gradient = layer.matmul_t(grad).double()
    assert relative_difference(gradient, grad.double() @ weight.double()) < 0.015
    assert relative_difference(gradient[:, [3, 77]], (grad.double() @ weight.double())[:, [3, 77]]) < 1e-5


def test_rows_of_zeros_and_of_nan_stay_what_they_are(layer: Int8Linear) -> None:
    x = torch.zeros(3, NUM_IN)
    x[1, 5], x[2, 5] = float("nan"), float("inf")
    out = layer.matmul(x, use_bias=False)
    assert torch.equal(out[0], torch.zeros(NUM_OUT))
    assert not out[1].isfinite().any()
    assert not out[2].isfinite().any()
    assert torch.equal(quantize_rows(x[:1])[0], torch.zeros(1, NUM_IN, dtype=torch.int8))


def test_loss_and_gradients_are_near_those_of_the_whole_weights(phi_dir: Path) -> None:
    """Reference: the same base in float32. Two layers round little; the direction of every gradient is kept."""
    ids = torch.randint(1, 500, (2, 60), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(60).expand(2, -1)
    losses, gradients = [], []
    for name in (None, "int8"):
        module = new_module(phi_dir, quantization=name)
        phi = module.fused_phi
        loss = causal_lm_loss(packed_forward(phi, ids, positions), ids, phi.lm_head)
        loss.nats.backward()
        losses.append(loss.nats.item() / loss.num_tokens.item())
        gradients.append({name: p.grad.flatten() for name, p in module.named_parameters() if p.grad is not None})
    assert losses[1] == pytest.approx(losses[0], abs=0.02)
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        assert torch.cosine_similarity(expected, gradients[1][name], dim=0) > 0.99, name


def test_an_example_has_the_same_bits_in_a_packed_row(phi_dir: Path) -> None:
    """Reference: the example alone, on the base without an adapter, whose products are all in int8."""
    phi = load_phi2(resolve_base_model(str(phi_dir)), torch.float32, quantize=True)
    examples = [
        torch.randint(1, 500, (length,), generator=torch.Generator().manual_seed(length)) for length in (40, 64)
    ]
    positions = torch.cat([torch.arange(len(example)) for example in examples])[None]
    with torch.no_grad():
        packed = packed_forward(phi, torch.cat(examples)[None], positions)[0]
        alone = [packed_forward(phi, example[None], torch.arange(len(example))[None])[0] for example in examples]
    assert torch.equal(packed, torch.cat(alone))


def test_products_in_inference_mode_leave_training_as_it_is(layer: Int8Linear) -> None:
    """A fit answers samples between its steps, and both use the same memory for a moment."""
    quantization._kept.__dict__.clear()
    x = torch.randn(3, NUM_IN)
    with torch.inference_mode():
        answered = layer(x)
    trained = layer(x.clone().requires_grad_(True))
    trained.sum().backward()
    assert torch.equal(answered, trained.detach())


def test_recomputed_activations_give_the_same_gradients(phi_dir: Path) -> None:
    ids, positions = torch.randint(1, 500, (1, 60)), torch.arange(60)[None]
    gradients = []
    for recompute in (False, True):
        module = new_module(phi_dir, quantization="int8")
        hidden = packed_forward(module.fused_phi, ids, positions, activation_checkpointing=recompute)
        causal_lm_loss(hidden, ids, module.fused_phi.lm_head).nats.backward()
        gradients.append([p.grad for p in module.parameters() if p.grad is not None])
    assert gradients[0]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_gelu_that_is_computed_again_gives_the_same_gradients(phi_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: GELU before fc2, whose slope and value are kept. Saved tensors of its width are counted."""
    ids, positions = torch.randint(1, 500, (1, 60)), torch.arange(60)[None]
    gradients, counts = [], []
    for applies_gelu in (False, True):
        monkeypatch.setattr(FusedLoraLinear, "applies_gelu", applies_gelu)
        module = new_module(phi_dir, quantization="int8")
        width = module.fused_phi.config.intermediate_size
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x) or x, lambda x: x):  # type: ignore[misc]
            hidden = packed_forward(module.fused_phi, ids, positions)
        counts.append(sum(x.shape[-1] == width and x.numel() == 60 * width for x in saved))
        causal_lm_loss(hidden, ids, module.fused_phi.lm_head).nats.backward()
        gradients.append([p.grad for p in module.parameters() if p.grad is not None])
    assert gradients[0]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    num_layers = module.fused_phi.config.num_hidden_layers
    assert counts == [2 * num_layers, num_layers]


def test_the_heap_is_trimmed_in_forward_and_backward(phi_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the second of two blocks, and in backward after it."""
    ids, positions = torch.randint(1, 500, (1, 60)), torch.arange(60)[None]
    trims: list[int] = []
    monkeypatch.setattr(phi2, "TRIM_BLOCKS", 1)
    monkeypatch.setattr(phi2, "trim_malloc", lambda: trims.append(len(trims)))
    for quantization_name, counts in (("int8", [1, 2]), (None, [0, 0])):
        trims.clear()
        phi = new_module(phi_dir, quantization=quantization_name).fused_phi
        with torch.no_grad():
            packed_forward(phi, ids, positions)
        hidden = packed_forward(phi, ids, positions)
        in_forward = len(trims)
        hidden.sum().backward()
        assert [in_forward, len(trims)] == counts


def test_an_unknown_quantization_is_refused(phi_dir: Path) -> None:
    with pytest.raises(InputError, match=r"model.quantization: is 'nf4'; expected int8 or null."):
        new_module(phi_dir, quantization="nf4")


def test_dequantized_weights_are_int8_times_scale() -> None:
    values, scale = torch.tensor([[1, -127], [2, 0]], dtype=torch.int8), torch.tensor([0.5, 2.0])
    assert dequantize(values, scale, torch.float32).tolist() == [[0.5, -63.5], [4.0, 0.0]]
