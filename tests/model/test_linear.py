"""Matmuls in bfloat16 on a CPU without bfloat16: as close to float64 as those of a CPU that has it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from helpers import new_module, relative_difference
from lit_phi2.model import linear
from lit_phi2.model.linear import EMULATION_MIN_ROWS, FrozenLinear, frozen_matmul
from lit_phi2.model.loss import causal_lm_loss
from lit_phi2.model.phi2 import packed_forward
from lit_phi2.types import IGNORE_INDEX

WIDE, TALL = (5, 130), (130, 5)  # (in, out): one is split along its outputs, the other along its inputs


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every machine multiplies bfloat16 in float32, seven rows in three chunks, the last of them short."""
    torch.manual_seed(0)
    monkeypatch.setattr(linear, "emulates_bf16", lambda: True)
    monkeypatch.setattr(linear, "CHUNK_NUMEL", 7 * 48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_a_matmul_in_chunks_is_rounded_once(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Reference: float64 over the same numbers. A sum of 130 products in float32 is off by about 1e-7 of its norm; in
    bfloat16 a tie may be rounded to either side."""
    num_in, num_out = shape
    matrix, bias = torch.randn(shape).bfloat16(), torch.randn(num_out).bfloat16()
    x, lora_x, lora_b = torch.randn(7, num_in).to(dtype), torch.randn(7, 2).to(dtype), torch.randn(2, num_out)
    product = x.double() @ matrix.double()
    updated = product + bias.double() + 0.3 * lora_x.double() @ lora_b.double()
    for result, expected in (
        (frozen_matmul(x, matrix), product),
        (frozen_matmul(x, matrix.t().contiguous().t()), product),  # in the memory layout of W^T
        (frozen_matmul(x, matrix, bias=bias, lora_x=lora_x, lora_b=lora_b, scale=0.3), updated),
    ):
        assert result.dtype == dtype
        rounded_once = expected.to(dtype).double()
        tolerance = 1e-6 if dtype == torch.float32 else 1e-3
        assert relative_difference(result.double(), rounded_once) < tolerance


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_float16_is_summed_in_float32_for_any_number_of_rows(shape: tuple[int, int], rows: int) -> None:
    """Reference: float64. Parts of each sum are in the hundred thousands, beyond float16's 65,504; the sums are not."""
    num_in, num_out = shape
    x, matrix = torch.full((rows, num_in), 300.0).half(), torch.full(shape, 280.0).half()
    x[:, 1::2] = -300.0
    lora_x, lora_b = torch.full((rows, 2), 500.0).half(), torch.tensor([[400.0], [-399.0]]).expand(2, num_out)
    expected = x.double() @ matrix.double() + 2 * lora_x.double() @ lora_b.double()
    result = frozen_matmul(x, matrix, lora_x=lora_x, lora_b=lora_b, scale=2.0)
    assert result.dtype == torch.float16
    assert torch.equal(result, expected.half())
    layer = FrozenLinear(num_in, num_out, bias=False, dtype=torch.float16).requires_grad_(False)
    layer.weight.copy_(matrix.t())
    assert torch.equal(layer(x), (x.double() @ matrix.double()).half())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_a_matmul_in_chunks_passes_gradcheck(shape: tuple[int, int], bias: bool) -> None:
    """bfloat16 weights under float64 activations."""
    num_in, num_out = shape
    layer = FrozenLinear(num_in, num_out, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    if bias:
        layer.bias = nn.Parameter(torch.randn(num_out, dtype=torch.float64), requires_grad=False)
    x = torch.randn(6, num_in, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_a_frozen_layer_rounds_once_forward_and_backward() -> None:
    layer = FrozenLinear(130, 5, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(2, 6, 130, dtype=torch.bfloat16, requires_grad=True)
    x_float64 = x.detach().double().requires_grad_()
    output = layer(x)
    expected = x_float64 @ layer.weight.double().t() + layer.bias.double()
    assert torch.equal(output, expected.bfloat16())  # no sum here is within float32's rounding of a tie
    output.add_(1).float().sum().backward()  # in place, as what follows a layer may do
    expected.sum().backward()
    assert torch.equal(x.grad, x_float64.grad.bfloat16())


@pytest.mark.parametrize("case", ["few rows", "float32", "trained", "native"])
def test_what_torch_multiplies_fast_is_torchs_own(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("multiplied in chunks")

    monkeypatch.setattr(linear, "frozen_matmul", refuse)
    if case == "native":
        monkeypatch.setattr(linear, "emulates_bf16", lambda: False)
    dtype = torch.float32 if case == "float32" else torch.bfloat16
    layer = FrozenLinear(130, 5, dtype=dtype).requires_grad_(case == "trained")
    x = torch.randn(EMULATION_MIN_ROWS - 1 if case == "few rows" else 32, 130, dtype=dtype)
    reference = nn.Linear(130, 5, dtype=dtype)
    reference.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), reference(x))


def test_emulation_is_decided_at_run_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the CPU has when a matmul is done, not when the module is imported."""
    x = torch.randn(32, 4, dtype=torch.bfloat16)
    assert linear.matmul_dtype(x) == torch.float32
    monkeypatch.setattr(linear, "emulates_bf16", lambda: False)
    assert linear.matmul_dtype(x) == torch.bfloat16


def test_the_frozen_layers_methods_are_its_matmuls() -> None:
    """Reference: float64 matmuls of the weight; x W^T + bias + scale lora, its transpose, and some of its rows."""
    layer = FrozenLinear(6, 4, dtype=torch.float64).requires_grad_(False)
    x, grad = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    lora_x = torch.randn(3, 2, dtype=torch.float64)
    lora_b, lora_a = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    forward = layer.matmul(x, lora_x=lora_x, lora_b=lora_b, scale=0.5)
    torch.testing.assert_close(forward, x @ layer.weight.t() + layer.bias + 0.5 * lora_x @ lora_b)
    backward = layer.matmul_t(grad, lora_x=lora_x, lora_b=lora_a)
    torch.testing.assert_close(backward, grad @ layer.weight + lora_x @ lora_a)
    assert torch.equal(layer.rows(slice(1, 3)), layer.weight[1:3])
    assert torch.equal(layer.rows(torch.tensor([3, 0, 3])), layer.weight[[3, 0, 3]])


def test_emulation_is_as_close_to_float64_as_torchs_own(phi_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and the gradients of the adapter. Float32 sums that are rounded once are worse only by chance."""
    modules = {name: new_module(phi_dir, dtype=name) for name in ("float32", "bfloat16")}
    float64, bfloat16 = modules["float32"], modules["bfloat16"]
    for parameter, source in zip(float64.phi.parameters(), bfloat16.phi.parameters(), strict=True):
        parameter.data = source.data.double()
    ids = torch.randint(0, float64.fused_phi.config.vocab_size, (2, 40))
    labels = ids.clone()
    labels[:, :9] = IGNORE_INDEX

    def nats_and_gradients(module: nn.Module) -> list[Tensor]:
        module.phi.eval().zero_grad()
        hidden = packed_forward(module.fused_phi, ids, torch.arange(40).repeat(2, 1))
        nats = causal_lm_loss(hidden, labels, module.fused_phi.lm_head).nats
        nats.backward()
        return [nats.detach(), *(p.grad for p in module.phi.parameters() if p.requires_grad)]

    expected = nats_and_gradients(float64)
    errors = {}
    for emulated in (True, False):
        monkeypatch.setattr(linear, "emulates_bf16", lambda emulated=emulated: emulated)
        results = nats_and_gradients(bfloat16)
        errors[emulated] = [relative_difference(a.double(), b) for a, b in zip(results, expected, strict=True)]
    assert sum(errors[True]) < 1.5 * sum(errors[False])
    assert max(errors[True]) < 0.05  # of a gradient through all layers: a dozen roundings to 8 bits
