"""The loss scale against torch.amp.GradScaler, which runs on the CPU too."""

import random
from typing import Any

import pytest
import torch
from torch import nn

from lit_phi2.errors import InputError
from lit_phi2.training import loss_scale
from lit_phi2.training.loss_scale import LossScale, new_loss_scale


def test_only_float16_has_a_loss_scale() -> None:
    assert new_loss_scale(torch.float16) == LossScale()
    assert new_loss_scale(torch.bfloat16) is None
    assert new_loss_scale(torch.float32) is None


def test_the_scale_starts_and_changes_as_torchs_by_default() -> None:
    """Reference: the defaults of torch.amp.GradScaler."""
    scaler = torch.amp.GradScaler("cpu")
    assert LossScale().scale == scaler.get_scale()
    assert scaler.get_growth_interval() == loss_scale.GROWTH_INTERVAL
    assert (scaler.get_growth_factor(), scaler.get_backoff_factor()) == (2.0, 0.5)


def test_scale_and_counter_follow_torchs_grad_scaler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: GradScaler over 200 steps, a quarter of whose gradients are infinite, on a real optimizer."""
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 3)
    scaler = torch.amp.GradScaler("cpu", growth_interval=3)
    scaler.scale(torch.zeros(()))  # creates its tensors
    ours, draw, skipped = LossScale(), random.Random(0), []
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    for step in range(1, 201):
        before = parameter.detach().clone()
        gradient = torch.randn(2) * ours.scale
        if draw.random() < 0.25 and ours.scale > 2:
            gradient[0] = float("inf")
        parameter.grad = gradient.clone()
        ours.unscale_([gradient])
        scaler.unscale_(optimizer)
        assert torch.equal(parameter.grad, gradient)
        scaler.step(optimizer)
        scaler.update()
        if gradient.isfinite().all():
            ours.step_taken()
        else:
            ours.step_skipped(step)
            skipped.append(step)
            assert torch.equal(parameter, before)
        assert ours.scale == scaler.get_scale()
        assert ours.good_steps == scaler.state_dict()["_growth_tracker"]
    assert ours.skipped_steps == skipped
    assert len(skipped) > 20


def test_a_scale_continues_from_its_state() -> None:
    ours = LossScale(2.0**20, 5, [3, 9])
    other = LossScale()
    other.load_state_dict(ours.state_dict(), source="last.ckpt")
    assert other == ours
    assert other.skipped_steps is not ours.skipped_steps


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scale": 0.0}, "scale is 0.0; expected a number from 1"),
        ({"scale": float("inf")}, "scale is inf"),
        ({"good_steps": 2000}, "good_steps is 2000; expected an integer from 0 to 1999"),
        ({"skipped_steps": ["1"]}, "skipped_steps is a list; expected a list of steps"),
        ({"skipped_steps": None}, "skipped_steps is null"),
    ],
)
def test_a_state_out_of_range_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"last.ckpt: loss_scale: {message}"):
        LossScale().load_state_dict(LossScale().state_dict() | changed, source="last.ckpt")
    with pytest.raises(InputError, match="has no scale"):
        LossScale().load_state_dict({}, source="last.ckpt")
