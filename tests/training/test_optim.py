"""Learning rate, clipping and the number of optimizer steps."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import Gradients, new_data, new_module, new_trainer, weights_of
from lit_phi2.errors import InputError
from lit_phi2.model.lora import trainable_parameters
from lit_phi2.training.module import LitPhi2
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


def test_lora_plus_gives_b_its_own_learning_rate(phi_dir: Path, train_file: Path, tmp_path: Path) -> None:
    """AdamW's first step by hand: lr g / (|g| + 1e-8), with the learning rate of A and 16 times that of B."""
    module = new_module(phi_dir, learning_rate=1e-3, lora_plus_ratio=16.0, weight_decay=0.0)
    before = weights_of(module)
    new_trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, new_data(phi_dir, train_file))
    (optimizer,) = module.trainer.optimizers
    for name, parameter in trainable_parameters(module.phi).items():
        gradient = optimizer.state[parameter]["exp_avg"] / 0.1
        rate = 16e-3 if "lora_B" in name else 1e-3
        step = parameter.detach() - before[name]
        torch.testing.assert_close(step, -rate * gradient / (gradient.abs() + 1e-8), rtol=1e-3, atol=1e-7)
        assert step.abs().max().item() == pytest.approx(rate, rel=1e-2)


def test_both_learning_rates_follow_the_schedule(phi_dir: Path, train_file: Path, tmp_path: Path) -> None:
    module = new_module(phi_dir, learning_rate=1e-3, lora_plus_ratio=4.0, warmup_ratio=0.25)
    logged: list[dict[str, float]] = []
    module.log_scalars = lambda values, step=None: logged.append(values)  # type: ignore[method-assign]
    data = new_data(phi_dir, train_file, packing=False)
    new_trainer(tmp_path, accumulate_grad_batches=3, limit_val_batches=0).fit(module, data)
    rates = [(values["lr"], values["lr_b"]) for values in logged if "lr" in values]
    assert [of_a for of_a, _ in rates] == pytest.approx([1e-3, 1e-3, 0.75e-3, 0.25e-3])
    assert all(of_b == pytest.approx(4 * of_a) for of_a, of_b in rates)


def test_a_ratio_of_one_is_plain_lora(phi_dir: Path, train_file: Path, tmp_path: Path) -> None:
    """Over 3 steps, and without the setting there is one group.

    To rounding: the norm that clips the gradients adds two groups in another order. Another ratio changes all of B.
    """
    trained = []
    for ratio in (None, 1.0):
        module = new_module(phi_dir, lora_plus_ratio=ratio)
        data = new_data(phi_dir, train_file, packing=False)
        new_trainer(tmp_path, max_steps=3, limit_val_batches=0).fit(module, data)
        assert len(module.trainer.optimizers[0].param_groups) == (1 if ratio is None else 2)
        trained.append(weights_of(module))
    torch.testing.assert_close(trained[1], trained[0], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("ratio", [0.0, -1.0, math.nan])
def test_a_ratio_that_trains_nothing_is_refused(ratio: float) -> None:
    with pytest.raises(InputError, match=r"model\.lora_plus_ratio: .* is not above 0"):
        LitPhi2(lora_plus_ratio=ratio)


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
