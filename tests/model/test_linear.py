"""Products in bfloat16 on a CPU that cannot multiply it: as near to float64 as those of a CPU that can."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from helpers import new_module, relative_difference
from lit_phi2.model import linear as products
from lit_phi2.model.linear import FrozenLinear, frozen_matmul
from lit_phi2.model.loss import causal_lm_loss
from lit_phi2.model.phi2 import packed_forward
from lit_phi2.types import IGNORE_INDEX

WIDE, TALL = (5, 130), (130, 5)  # (out, in): one is cut along its inputs, the other along its outputs


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(products, "EMULATED", True)
    monkeypatch.setattr(products, "PIECE", 7 * 48)  # of seven rows three pieces, the last of them short


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_products_in_pieces_are_rounded_once(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Reference: float64 over the same numbers. A sum of 130 products in float32 is off by some 1e-7 of its norm."""
    rows, columns = shape
    matrix, bias, x = torch.randn(shape).bfloat16(), torch.randn(columns).bfloat16(), torch.randn(7, rows).to(dtype)
    low, up = torch.randn(7, 2).to(dtype), torch.randn(2, columns)
    exact = x.double() @ matrix.double()
    updated = exact + bias.double() + 0.3 * low.double() @ up.double()
    for got, expected in (
        (frozen_matmul(x, matrix), exact),
        (frozen_matmul(x, matrix.t().contiguous().t()), exact),  # as W^T lies
        (frozen_matmul(x, matrix, bias=bias, low=low, up=up, scale=0.3), updated),
    ):
        assert got.dtype == dtype
        once = expected.to(dtype).double()
        assert relative_difference(got.double(), once) < (
            1e-6 if dtype == torch.float32 else 1e-3
        )  # or of a tie the other side


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_gradcheck_of_a_product_in_pieces(shape: tuple[int, int], bias: bool) -> None:
    """The weights are bfloat16, all else float64."""
    num_out, num_in = shape
    weight = torch.randn(shape).bfloat16()
    added = torch.randn(num_out, dtype=torch.float64) if bias else None
    x = torch.randn(6, num_in, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: products._FrozenLinearFn.apply(x, weight, added), (x,))


def test_a_frozen_linear_layer_is_rounded_once_and_behaves_as_torchs_own() -> None:
    layer = FrozenLinear(130, 5, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(2, 6, 130, dtype=torch.bfloat16, requires_grad=True)
    exact_x = x.detach().double().requires_grad_()
    output = layer(x)
    exact = exact_x @ layer.weight.double().t() + layer.bias.double()
    assert torch.equal(output, exact.bfloat16())  # no sum of these lies within float32's rounding of a tie
    output.add_(1).float().sum().backward()  # in place, as what follows a layer may do
    exact.sum().backward()
    assert torch.equal(x.grad, exact_x.grad.bfloat16())


@pytest.mark.parametrize("what", ["few rows", "float32", "trained", "native"])
def test_what_torch_multiplies_well_is_torchs_own(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("in pieces")

    monkeypatch.setattr(products, "_finish", refuse)
    if what == "native":
        monkeypatch.setattr(products, "EMULATED", False)
    dtype = torch.float32 if what == "float32" else torch.bfloat16
    layer = FrozenLinear(130, 5, dtype=dtype).requires_grad_(what == "trained")
    x = torch.randn(products.EMULATION_MIN_ROWS if what == "few rows" else 32, 130, dtype=dtype)
    own = nn.Linear(130, 5, dtype=dtype)
    own.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), own(x))


def test_a_model_in_bfloat16_is_as_near_to_float64_as_with_torchs_own_products(
    phi_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and the gradients of the adapter. Float32 sums, rounded once, are no worse but by chance."""
    modules = {name: new_module(phi_dir, dtype=name) for name in ("float32", "bfloat16")}
    exact, rounded = modules["float32"], modules["bfloat16"]
    for ours, theirs in zip(exact.phi.parameters(), rounded.phi.parameters(), strict=True):
        ours.data = theirs.data.double()
    ids = torch.randint(0, exact.fused_phi.config.vocab_size, (2, 40))
    labels = ids.clone()
    labels[:, :9] = IGNORE_INDEX

    def nats_and_gradients(module: nn.Module) -> list[Tensor]:
        module.phi.eval().zero_grad()
        hidden = packed_forward(module.fused_phi, ids, torch.arange(40).repeat(2, 1))
        nats = causal_lm_loss(hidden, labels, module.fused_phi.lm_head).nats
        nats.backward()
        return [nats.detach(), *(p.grad for p in module.phi.parameters() if p.requires_grad)]

    expected = nats_and_gradients(exact)
    off = {}
    for emulated in (True, False):
        monkeypatch.setattr(products, "EMULATED", emulated)
        got = nats_and_gradients(rounded)
        off[emulated] = [relative_difference(one.double(), other) for one, other in zip(got, expected, strict=True)]
    assert sum(off[True]) < 1.5 * sum(off[False])
    assert max(off[True]) < 0.05  # of a gradient through all layers: a dozen roundings to 8 bits
