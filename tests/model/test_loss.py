"""The loss: sums over supervised positions, against torch's cross-entropy."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  the name that torch's own documentation uses
from transformers.loss.loss_utils import ForCausalLMLoss

from lit_phi2.model import loss as loss_module
from lit_phi2.model.linear import FrozenLinear
from lit_phi2.model.loss import LOGITS_BYTES, PAD_ROWS_TO, causal_lm_loss, logits_limit, vocab_chunk
from lit_phi2.types import IGNORE_INDEX


class CountingHead(nn.Linear):
    rows = 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.rows += hidden.shape[0]
        return super().forward(hidden)


def test_nats_equal_cross_entropy_over_shifted_labels() -> None:
    """Reference: torch's cross entropy on all logits, labels shifted by hand."""
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 7, 16), nn.Linear(16, 11)
    labels = torch.randint(0, 11, (2, 7))
    labels[0, :3] = labels[1, 5:] = IGNORE_INDEX
    loss = causal_lm_loss(hidden, labels, head)
    logits = head(hidden)[:, :-1].reshape(-1, 11)
    expected = F.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum")
    torch.testing.assert_close(loss.nats, expected, rtol=1e-6, atol=0)
    supervised = labels[:, 1:] != IGNORE_INDEX
    assert loss.num_tokens == supervised.sum() == 8
    assert loss.num_correct == (logits.view(2, 6, 11).argmax(-1) == labels[:, 1:])[supervised].sum()


def test_prompt_and_padding_never_reach_the_output_layer() -> None:
    head = CountingHead(16, 11)
    labels = torch.full((3, 20), IGNORE_INDEX)
    labels[1, 4:7] = 2
    causal_lm_loss(torch.randn(3, 20, 16), labels, head)
    assert head.rows == 3


def test_hidden_states_of_prompts_get_no_gradient() -> None:
    """The state at t scores the label at t + 1, so the last prompt token's state scores the first response token."""
    hidden = torch.randn(1, 6, 16, requires_grad=True)
    labels = torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX, 4, 5, IGNORE_INDEX]])
    causal_lm_loss(hidden, labels, nn.Linear(16, 11)).nats.backward()
    assert hidden.grad is not None
    assert hidden.grad[0].abs().sum(-1).bool().tolist() == [False, False, True, True, False, False]


def test_without_labels_the_loss_is_zero_and_connected() -> None:
    """A rank without rows must still run backward, or the other ranks wait for it."""
    hidden = torch.randn(1, 3, 16, requires_grad=True)
    loss = causal_lm_loss(hidden, torch.full((1, 3), IGNORE_INDEX), nn.Linear(16, 11))
    loss.nats.backward()
    assert (loss.nats.item(), loss.num_tokens.item()) == (0, 0)
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_bfloat16_logits_are_reduced_in_float32() -> None:
    """100,000 equal tokens: in bfloat16 the sum would stop growing after a few hundred."""
    head = nn.Linear(4, 8, bias=False).bfloat16()
    with torch.no_grad():
        head.weight.zero_()
    labels = torch.ones(1, 100_001, dtype=torch.int64)
    loss = causal_lm_loss(torch.zeros(1, 100_001, 4, dtype=torch.bfloat16), labels, head)
    assert loss.nats.dtype == torch.float32
    assert loss.nats.item() == pytest.approx(100_000 * torch.log(torch.tensor(8.0)).item(), rel=1e-4)


def test_a_loss_scale_beyond_float16_scales_its_gradients() -> None:
    """Reference: float64. 2^16 is infinite in float16, and a gradient of 1e-5 has a step of 6e-8 there: the product is
    computed in float32. So is softmax - 1, which is accurate to 1e-7."""
    torch.manual_seed(0)
    head = FrozenLinear(8, 40, dtype=torch.float16).requires_grad_(False)
    hidden = torch.randn(1, 6, 8).half()
    labels = torch.full((1, 6), 7)
    head.bias[7] += 13
    scaled, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    (causal_lm_loss(scaled, labels, head).nats * 2.0**16).backward()
    logits = exact[0, :-1] @ head.weight.double().t() + head.bias.double()
    F.cross_entropy(logits, labels[0, 1:], reduction="sum").backward()
    assert exact.grad is not None
    assert 1e-6 < exact.grad[0, :-1].abs().median() < 6e-5
    torch.testing.assert_close(scaled.grad.double() / 2.0**16, exact.grad, rtol=2e-3, atol=1e-7)


def test_labels_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="hidden covers"):
        causal_lm_loss(torch.zeros(1, 3, 4), torch.zeros(1, 4, dtype=torch.int64), nn.Linear(4, 8))


@pytest.mark.parametrize("bias", [True, False])
def test_the_chunked_loss_passes_gradcheck(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "LOGITS_BYTES", PAD_ROWS_TO * 16 * 3)  # chunks of three of the eleven tokens
    head = FrozenLinear(6, 11, bias=bias, dtype=torch.float64).requires_grad_(False)
    hidden = torch.randn(1, 9, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[IGNORE_INDEX, 3, 4, IGNORE_INDEX, 10, 0, 1, 2, 2]])
    assert torch.autograd.gradcheck(lambda hidden: causal_lm_loss(hidden, labels, head).nats * 0.7, (hidden,))


@pytest.mark.parametrize("chunk_size", [1, 4, 1000])
def test_a_frozen_output_layer_gives_the_loss_of_a_trained(chunk_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: torch's cross entropy, which an output layer with gradients uses."""
    monkeypatch.setattr(loss_module, "LOGITS_BYTES", chunk_size * PAD_ROWS_TO * 16)  # 32 positions of 16 bytes
    head = FrozenLinear(6, 11, dtype=torch.float64)
    hidden = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 11, (2, 9))
    expected = causal_lm_loss(hidden, labels, head)
    expected_grad = torch.autograd.grad(expected.nats, hidden)[0]
    loss = causal_lm_loss(hidden, labels, copy.deepcopy(head).requires_grad_(False))
    torch.testing.assert_close(loss.nats, expected.nats, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss.nats, hidden)[0], expected_grad, rtol=1e-12, atol=1e-14)
    assert (loss.num_tokens, loss.num_correct) == (expected.num_tokens, expected.num_correct)


@pytest.mark.parametrize("chunk_size", [1, 7, 300, 1000])
def test_loss_and_gradient_do_not_depend_on_the_chunk(chunk_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: transformers' own loss in float64. The sum over 1,000 tokens has some 1e-7 of rounding in float32."""
    monkeypatch.setattr(loss_module, "LOGITS_BYTES", chunk_size * PAD_ROWS_TO * 8)  # 32 positions of 8 bytes
    torch.manual_seed(0)
    head = FrozenLinear(24, 1000).requires_grad_(False)
    hidden, labels = torch.randn(2, 12, 24, requires_grad=True), torch.randint(0, 1000, (2, 12))
    labels[0, :5] = IGNORE_INDEX
    exact = hidden.detach().double().requires_grad_()
    logits = exact @ head.weight.double().t() + head.bias.double()
    expected = ForCausalLMLoss(logits, labels, vocab_size=1000, num_items_in_batch=torch.tensor(1.0).double())
    expected_grad = torch.autograd.grad(expected, exact)[0]
    loss = causal_lm_loss(hidden, labels, head)
    assert loss.nats.item() == pytest.approx(expected.item(), rel=1e-6)
    grad = torch.autograd.grad(loss.nats, hidden)[0]
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-4, atol=1e-6)


def test_the_logits_of_a_chunk_are_sized_for_the_card() -> None:
    """Reference: by hand. 4 GB to 141 GB of memory; 8,192 positions of 4 and 2 bytes, in chunks of the same size."""
    gib, mib = 2**30, 2**20
    limits = [logits_limit("cuda", memory * gib) // mib for memory in (2, 4, 16, 80, 141)]
    assert limits == [64, 64, 256, 1280, 2256]
    assert logits_limit("cpu", 80 * gib) == logits_limit("mps", 80 * gib) == LOGITS_BYTES == 64 * mib
    num_chunks = [-(-51200 // vocab_chunk(8192, 6, 51200, "cuda", limit * mib)) for limit in limits]
    assert num_chunks == [38, 38, 10, 2, 2]  # 2,400 MiB of logits / limit
    assert vocab_chunk(32, 6, 51200, "cuda", gib) == 51200  # few positions: all at once
    assert vocab_chunk(32, 6, 51200, "cpu", LOGITS_BYTES) == 3939  # at most 4,096, for the cache
    assert vocab_chunk(10**9, 6, 51200, "cuda", gib) == 1
