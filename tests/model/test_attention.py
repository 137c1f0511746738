"""Packed attention: against one masked softmax over all tokens, and its gradients."""

import pytest
import torch
from torch import Tensor

from helpers import DEVICES
from lit_phi2.model import attention
from lit_phi2.model.attention import (
    PackedLayout,
    RotateQkv,
    apply_rotary_emb,
    block_causal_mask,
    packed_attention,
    packed_layout,
)

POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0], [0, 1, 2, 3, 0, 0, 0, 1, 2]])
SEGMENTS = [(0, 5), (5, 8), (8, 9), (9, 13), (13, 14), (14, 15), (15, 18)]
LAYOUT = PackedLayout(SEGMENTS)


def angles(length: int, pairs: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    phases = torch.arange(length, dtype=dtype)[:, None] / 3 ** torch.arange(1, pairs + 1, dtype=dtype)
    return phases.cos(), phases.sin()


def test_segments_end_where_positions_restart() -> None:
    assert packed_layout(POSITIONS).segments == SEGMENTS


@pytest.mark.parametrize("query_block", [2, 256])
def test_attention_passes_gradcheck(query_block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "QUERY_BLOCK", query_block)
    qkv = torch.randn(18, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    cos, sin = angles(18, 2)
    assert torch.autograd.gradcheck(lambda qkv: packed_attention(qkv, cos, sin, LAYOUT, scaling=0.4), (qkv,))


def test_attention_equals_masked_softmax_over_all_tokens() -> None:
    """Reference: one softmax over all pairs, with everything except the example's past masked by hand."""
    qkv = torch.randn(18, 3, 2, 6, dtype=torch.float64)
    cos, sin = angles(18, 2)
    query, key = apply_rotary_emb(qkv[:, :2], cos, sin).unbind(1)
    example = torch.tensor([n for n, (start, end) in enumerate(SEGMENTS) for _ in range(start, end)])
    visible = (example[:, None] == example) & torch.ones(18, 18, dtype=torch.bool).tril()
    scores = torch.einsum("qhd,khd->hqk", query, key) * 0.4
    probs = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    expected = torch.einsum("hqk,khd->qhd", probs, qkv[:, 2])
    attn_out = packed_attention(qkv, cos, sin, LAYOUT, scaling=0.4)
    torch.testing.assert_close(attn_out, expected, rtol=1e-12, atol=1e-12)


def test_rotated_queries_and_keys_have_memory_of_their_own() -> None:
    """Reference: rotary by slices of qkv; qkv itself can be freed before backward."""
    qkv = torch.randn(18, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    cos, sin = angles(18, 2)
    assert torch.autograd.gradcheck(lambda qkv: RotateQkv.apply(qkv, cos, sin), (qkv,))
    rotated = RotateQkv.apply(qkv, cos, sin)
    expected = (*apply_rotary_emb(qkv[:, :2], cos, sin).unbind(1), qkv[:, 2])
    for actual, reference in zip(rotated, expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-14, atol=1e-15)
        assert actual.untyped_storage().data_ptr() != qkv.untyped_storage().data_ptr()


def test_masked_rows_equal_attention_by_example() -> None:
    """The code path of MPS, run on the CPU."""
    qkv = torch.randn(18, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    cos, sin = angles(18, 2)
    masked = PackedLayout(SEGMENTS, attn_mask=block_causal_mask(POSITIONS))
    outputs = [packed_attention(qkv, cos, sin, layout, scaling=0.4) for layout in (LAYOUT, masked)]
    gradients = [torch.autograd.grad(attn_out.square().sum(), qkv)[0] for attn_out in outputs]
    for by_example, by_mask in (outputs, gradients):
        torch.testing.assert_close(by_example, by_mask, rtol=1e-12, atol=1e-12)


def test_attention_dropout_drops_and_keeps_the_mean() -> None:
    qkv = torch.randn(18, 3, 2, 6, dtype=torch.float64)
    cos, sin = angles(18, 2)
    plain = packed_attention(qkv, cos, sin, LAYOUT, scaling=0.4)
    torch.manual_seed(0)
    samples = torch.stack([packed_attention(qkv, cos, sin, LAYOUT, scaling=0.4, dropout=0.2) for _ in range(3000)])
    assert not torch.equal(samples[0], samples[1])
    assert (samples.mean(0) - plain).abs().max() < 5 * samples.std(0).max() / 3000**0.5


@pytest.mark.parametrize("path", ["CPU", "CPU, dropout", "MPS"])
def test_scores_beyond_float16_are_computed_in_float32(path: str) -> None:
    """Values and gradients, against float64 of the same numbers.

    The largest score is 100,000 before it is scaled, where float16 ends at 65,504: a product in float16 is infinite.
    Rotary off, so that queries and keys are not rounded again. A float32 of that size has steps of 0.008.
    """
    torch.manual_seed(0)
    qkv = torch.randn(18, 3, 2, 16).half()
    qkv[:, :2, :, 0] = 316
    assert torch.bmm(qkv[None, :, 0, 0], qkv[None, :, 1, 0].transpose(1, 2)).isinf().any()
    cos, sin = torch.ones(18, 4), torch.zeros(18, 4)
    qkv_float64 = qkv.double().requires_grad_()
    expected = packed_attention(qkv_float64, cos.double(), sin.double(), LAYOUT, scaling=0.25)
    expected_grad = torch.autograd.grad(expected.square().sum(), qkv_float64)[0]
    qkv = qkv.requires_grad_()
    layout = PackedLayout(SEGMENTS, attn_mask=block_causal_mask(POSITIONS)) if path == "MPS" else LAYOUT
    dropout = 1e-9 * (path == "CPU, dropout")  # takes the code path of dropout and drops nothing
    attn_out = packed_attention(qkv, cos.half(), sin.half(), layout, scaling=0.25, dropout=dropout)
    torch.testing.assert_close(attn_out.double(), expected, rtol=1e-2, atol=1e-2)
    gradient = torch.autograd.grad(attn_out.double().square().sum(), qkv)[0]
    torch.testing.assert_close(gradient.double(), expected_grad, rtol=1e-2, atol=1e-2 * expected_grad.abs().max())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_on_a_device_equals_the_cpu(device: str, dtype: torch.dtype) -> None:
    """Values and gradients, against float64 on the CPU; bfloat16 has 8 bits, and a sum of 16 products loses two.

    float16 has 11 bits.
    """
    torch.manual_seed(0)
    qkv = torch.randn(18, 3, 2, 16, dtype=torch.float64).to(dtype)
    cos, sin = angles(18, 4)
    qkv_cpu = qkv.double().requires_grad_()
    expected = packed_attention(qkv_cpu, cos, sin, LAYOUT, scaling=0.25)
    expected_grad = torch.autograd.grad(expected.sum(), qkv_cpu)[0]
    qkv_device = qkv.to(device).requires_grad_()
    layout = packed_layout(POSITIONS.to(device))
    attn_out = packed_attention(qkv_device, cos.to(device, dtype), sin.to(device, dtype), layout, scaling=0.25)
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(attn_out.cpu().double(), expected, rtol=tolerance, atol=tolerance)
    gradient = torch.autograd.grad(attn_out.sum(), qkv_device)[0]
    torch.testing.assert_close(gradient.cpu().double(), expected_grad, rtol=tolerance, atol=tolerance)
