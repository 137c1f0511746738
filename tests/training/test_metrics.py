"""Validation metrics are means over tokens, and a NaN is not dropped."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers import new_data, new_module, new_trainer
from lit_phi2.errors import NonFiniteError
from lit_phi2.model.loss import Loss
from lit_phi2.training.metrics import AccumulationWindow
from lit_phi2.types import Batch


def test_validation_loss_is_the_mean_over_tokens(
    phi_dir: Path, train_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reference: torch's cross entropy over all supervised tokens of all records at once."""
    module = new_module(phi_dir)
    data = new_data(phi_dir, train_file)
    trainer = new_trainer(tmp_path)
    trainer.validate(module, data)
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("val/"))
    logits, labels = [], []
    module.eval()
    for example in data.splits["val"].examples:
        ids = torch.tensor([example.ids])
        with torch.no_grad():
            logits.append(module.fused_phi(input_ids=ids).logits[0, example.prompt_length - 1 : -1])
        labels.append(ids[0, example.prompt_length :])
    expected = nn.functional.cross_entropy(torch.cat(logits), torch.cat(labels)).item()
    accuracy = (torch.cat(logits).argmax(-1) == torch.cat(labels)).float().mean().item()
    assert float(printed["val/loss"]) == pytest.approx(expected, rel=1e-5)
    assert float(printed["val/perplexity"]) == pytest.approx(math.exp(expected), rel=1e-4)
    assert float(printed["val/token_accuracy"]) == pytest.approx(accuracy, abs=1e-6)


def test_one_non_finite_batch_makes_the_validation_non_finite(phi_dir: Path, train_file: Path, tmp_path: Path) -> None:
    """By default torchmetrics drops NaNs from a mean, and a broken model would have the best loss."""
    module = new_module(phi_dir)
    inner_loss = module.loss
    factors = iter([math.nan])  # of the first batch; 1 afterwards
    module.loss = lambda batch: (loss := inner_loss(batch))._replace(nats=loss.nats * next(factors, 1.0))  # type: ignore[method-assign]
    trainer = new_trainer(tmp_path)
    trainer.validate(module, new_data(phi_dir, train_file, packing=False))
    assert math.isnan(trainer.callback_metrics["val/loss"])


class OneProcess:
    """The part of a Strategy that a window uses."""

    def reduce(self, tensor: torch.Tensor, reduce_op: str) -> torch.Tensor:
        return tensor


@pytest.mark.parametrize(
    ("loss", "grad_norm", "can_skip", "overflow", "message"),
    [
        (2.0, 1.0, False, None, None),
        (2.0, math.nan, True, None, None),  # a smaller loss scale may do
        (2.0, math.inf, False, None, "norm inf; .* The records in it: a:1, a:2$"),
        (math.nan, 1.0, True, None, "loss is nan .* The records in it: a:1, a:2$"),
        (2.0, math.nan, True, "fc1 overflows", "norm nan; .* fc1 overflows$"),  # no loss scale changes the forward pass
    ],
)
def test_only_steps_that_a_smaller_scale_may_save_are_skipped(
    loss: float, grad_norm: float, can_skip: bool, overflow: str | None, message: str | None
) -> None:
    window = AccumulationWindow()
    for location in ("a:1", "a:2"):
        ids = torch.zeros(1, 1, dtype=torch.int64)
        nats = Loss(torch.tensor(loss), torch.tensor(1), torch.tensor(0))
        window.add(nats, Batch(ids, ids, ids, [], 1, 1, locations=[location]))
    strategy: Any = OneProcess()
    settings = {"grad_norm": grad_norm, "step": 1, "can_skip": can_skip, "describe_overflow": lambda _: overflow}
    if message is None:
        assert window.close(strategy, **settings) == (2.0, 2)
        assert not window.batches
    else:
        with pytest.raises(NonFiniteError, match=f"step 1: .*{message}"):
            window.close(strategy, **settings)
