"""The loss: sums over supervised positions and nothing else."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from lit_phi2.model.loss import causal_lm_loss
from lit_phi2.types import IGNORE_INDEX


class CountingHead(nn.Linear):
    rows = 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.rows += hidden.shape[0]
        return super().forward(hidden)


def test_nats_and_tokens_equal_cross_entropy_over_shifted_labels() -> None:
    """Reference: torch's cross entropy on all logits, labels shifted by hand."""
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 7, 16), nn.Linear(16, 11)
    labels = torch.randint(0, 11, (2, 7))
    labels[0, :3] = labels[1, 5:] = IGNORE_INDEX
    loss = causal_lm_loss(hidden, labels, head)
    logits = head(hidden)[:, :-1].reshape(-1, 11)
    expected = functional.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum")
    torch.testing.assert_close(loss.nats, expected, rtol=1e-6, atol=0)
    kept = labels[:, 1:] != IGNORE_INDEX
    assert loss.num_tokens == kept.sum() == 8
    assert loss.num_correct == (logits.view(2, 6, 11).argmax(-1) == labels[:, 1:])[kept].sum()


def test_prompt_and_padding_never_reach_the_head() -> None:
    head = CountingHead(16, 11)
    labels = torch.full((3, 20), IGNORE_INDEX)
    labels[1, 4:7] = 2
    causal_lm_loss(torch.randn(3, 20, 16), labels, head)
    assert head.rows == 3


def test_hidden_states_of_prompts_get_no_gradient() -> None:
    """The state at t scores the label at t + 1, so it is that of the last prompt token which starts the response."""
    hidden = torch.randn(1, 6, 16, requires_grad=True)
    labels = torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX, 4, 5, IGNORE_INDEX]])
    causal_lm_loss(hidden, labels, nn.Linear(16, 11)).nats.backward()
    assert hidden.grad is not None
    assert hidden.grad[0].abs().sum(-1).bool().tolist() == [False, False, True, True, False, False]


def test_without_labels_the_loss_is_zero_and_connected() -> None:
    """A rank with nothing to do must still run backward, or the others wait for it."""
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


def test_shapes_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="hidden covers"):
        causal_lm_loss(torch.zeros(1, 3, 4), torch.zeros(1, 4, dtype=torch.int64), nn.Linear(4, 8))
