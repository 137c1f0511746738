"""Learning rate, clipping and the number of optimizer steps."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import Gradients, new_data, new_module, new_trainer
from lit_phi2.errors import InputError
from lit_phi2.training.optim import warmup_then_cosine


def test_learning_rate_warms_up_then_follows_a_cosine(phi_dir: Path, train_file: Path, tmp_path: Path) -> None:
    """Reference: the closed form at every step of two epochs; the number of steps is counted by hand."""
    module = new_module(phi_dir, learning_rate=1e-3, warmup_ratio=0.25)
    data = new_data(phi_dir, train_file, packing=False)
    rates: list[float] = []
    module.log_scalars = lambda values, step=None: rates.extend([values["lr"]] if "lr" in values else [])  # type: ignore[method-assign]
    new_trainer(tmp_path, max_epochs=2, accumulate_grad_batches=5, limit_val_batches=0).fit(module, data)
    steps = 2 * 3  # 12 records in accumulation windows of 5, 5 and 2, twice
    warmup = 2  # a quarter of 6, rounded up
    expected = [1e-3 * (step + 1) / warmup for step in range(warmup)]
    expected += [1e-3 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) for step in range(2, steps)]
    assert rates == pytest.approx(expected)
    assert warmup_then_cosine(steps, warmup_steps=warmup, total_steps=steps) == 0


def test_gradients_are_clipped_to_the_configured_norm(phi_dir: Path, train_file: Path, tmp_path: Path) -> None:
    """Reference: AdamW's first moment after one step, which is 0.1 x the gradient that it got."""
    module = new_module(phi_dir)
    gradients = Gradients()
    new_trainer(tmp_path, [gradients], max_steps=1, gradient_clip_val=0.01).fit(module, new_data(phi_dir, train_file))
    (optimizer,) = module.trainer.optimizers
    clipped = torch.cat([state["exp_avg"].flatten() / 0.1 for state in optimizer.state.values()])
    before = torch.cat([gradient.flatten() for gradient in gradients.steps[0].values()])
    assert before.norm() > 0.1
    assert clipped.norm().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": 0}, "leave nothing to train"),
        ({"max_epochs": -1}, "one must be set"),
        ({"limit_train_batches": 0.01}, r"trainer\.limit_train_batches: 0\.01 of 12 batches"),
    ],
)
def test_limits_without_a_step_are_refused_without_a_folder(
    settings: dict[str, Any], message: str, phi_dir: Path, train_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        new_trainer(tmp_path, keep=True, **settings).fit(
            new_module(phi_dir), new_data(phi_dir, train_file, packing=False)
        )
    assert not (tmp_path / "run").exists()
