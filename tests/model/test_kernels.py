"""GELU and the residual sum with dropout: against torch's own, and their gradients."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  the name that torch's own documentation uses

from lit_phi2.model import kernels
from lit_phi2.model.kernels import dropout_add_residual, dropout_mask, dropout_seed, gelu


def test_gelu_passes_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CHUNK_NUMEL", 4)  # three chunks, the last of them short
    x = torch.linspace(-4, 4, 10, dtype=torch.float64).view(2, 5).requires_grad_()
    assert torch.autograd.gradcheck(gelu, (x,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gelu_equals_torchs_own(dtype: torch.dtype) -> None:
    """Reference: torch's GELU by tanh in float64, value and slope.

    The argument of the sigmoid is in the tens where the value still counts, and so is the rounding error that it
    carries: 64 units in the last offset of 1. The cube of 41 is beyond float16.
    """
    ends = torch.tensor([0.0, -0.0, 1e-8, 41.0, -41.0, 300.0, -300.0, 65504.0, -65504.0])
    x = torch.cat([torch.linspace(-30, 30, 4001), ends]).to(dtype)
    expected_x = x.double().clone().requires_grad_()
    expected = F.gelu(expected_x, approximate="tanh")
    ours_x = x.clone().requires_grad_()
    ours = gelu(ours_x)
    assert ours.dtype == dtype
    pairs = (
        (ours, expected),
        (torch.autograd.grad(ours.sum(), ours_x)[0], torch.autograd.grad(expected.sum(), expected_x)[0]),
    )
    eps = torch.finfo(dtype).eps
    for value, expected_value in pairs:
        torch.testing.assert_close(value.double(), expected_value, rtol=4 * eps, atol=64 * eps)
    assert torch.equal(gelu(x), F.gelu(x, approximate="tanh"))  # without gradients it is torch's


def test_residual_sum_passes_gradcheck() -> None:
    def seeded(hidden: Tensor, attn_output: Tensor, mlp_output: Tensor) -> Tensor:
        torch.manual_seed(5)  # the same masks each time
        return dropout_add_residual(hidden, attn_output, mlp_output, dropout=0.3)

    inputs = tuple(torch.randn(5, 6, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(seeded, inputs)


def test_residual_sum_scales_what_dropout_keeps() -> None:
    """Reference: the formula, with the two masks drawn by hand from the same seed; a quarter is exact in 1/65,536."""
    hidden, attn_output, mlp_output = (torch.randn(5, 6, dtype=torch.float64) for _ in range(3))
    torch.manual_seed(5)
    attn_mask, mlp_mask = (dropout_mask(hidden, 2**14, dropout_seed()).double() for _ in range(2))
    assert 0 < attn_mask.sum() < 30
    expected = hidden + attn_output * attn_mask / 0.75 + mlp_output * mlp_mask / 0.75
    torch.manual_seed(5)
    total = dropout_add_residual(hidden, attn_output, mlp_output, dropout=0.25)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)


def test_dropout_masks_are_independent_and_seeded() -> None:
    """A tenth of 400,000 elements.

    The dropped fraction is within five standard deviations in each of the four offsets in a 64-bit number, and is no
    more correlated between draws or neighbours than chance allows.
    """
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = (dropout_mask(torch.empty(1000, 400), 6554, dropout_seed()).bool() for _ in range(2))
    p, spread = 6554 / 2**16, (0.1 * 0.9 / 100_000) ** 0.5
    for offset in range(4):
        assert abs((~first).flatten()[offset::4].float().mean() - p) < 5 * spread
        in_both = (~first).flatten()[offset::4] & (~second).flatten()[offset::4]
        neighbours = (~first).flatten()[offset::4] & (~first).flatten().roll(-1)[offset::4]
        for joint in (in_both, neighbours):
            assert abs(joint.float().mean() - p * p) < 5 * (p * p / 100_000) ** 0.5
    torch.set_rng_state(state)
    assert torch.equal(dropout_mask(torch.empty(1000, 400), 6554, dropout_seed()).bool(), first)


def test_a_dropout_mask_may_have_any_number_of_elements() -> None:
    assert dropout_mask(torch.empty(3, 3), 0, seed=1).all()  # four do not divide nine
