"""Membership by loss: rates against brute force, published values and distributions of known AUC."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from lit_phi2.audit.leakage import auc, exact_rate, membership, true_positive_rate
from lit_phi2.cli.main import main


def test_auc_is_that_of_scikit_learn_with_ties() -> None:
    generator = np.random.default_rng(0)
    members, others = generator.integers(0, 30, 200) / 10, generator.integers(0, 25, 300) / 10
    expected = roc_auc_score([1] * 200 + [0] * 300, [*members, *others])
    assert auc(members, others).value == pytest.approx(expected)


def test_auc_of_shifted_normals_has_its_closed_form() -> None:
    """Reference: P(X > Y) of normals one apart is Phi(1 / sqrt(2)); equal scores of an untrained adapter are chance."""
    generator = np.random.default_rng(1)
    rate = auc(generator.normal(1, 1, 4000), generator.normal(0, 1, 4000))
    exact = 0.5 * (1 + math.erf(0.5))
    assert rate.low < exact < rate.high
    assert rate.high - rate.low < 0.03
    chance = auc(np.zeros(50), np.zeros(70))
    assert chance.low < chance.value == 0.5 < chance.high


def test_the_auc_interval_covers_chance_in_95_of_100_draws() -> None:
    """Reference: the level of the interval; 400 draws are within 4 standard deviations of 380."""
    generator = np.random.default_rng(2)
    rates = [auc(generator.normal(size=40), generator.normal(size=60)) for _ in range(400)]
    assert 362 <= sum(rate.low <= 0.5 <= rate.high for rate in rates) <= 398


def test_exact_intervals_are_the_published_ones() -> None:
    """Reference: Clopper and Pearson 1934; 3/n rule for no event; an interval of 1 of 20 from R's binom.test."""
    rate = exact_rate(1, 20)
    assert (rate.low, rate.high) == (pytest.approx(0.00126509, abs=1e-6), pytest.approx(0.2487328, abs=1e-6))
    assert exact_rate(0, 300).high == pytest.approx(1 - 0.025 ** (1 / 300))


def test_at_one_percent_false_positives_one_of_a_hundred_may_pass() -> None:
    others = np.arange(100.0)
    assert true_positive_rate(np.array([98.5, 99.5, 97.0, 98.0]), others).value == 0.5
    assert true_positive_rate(np.array([98.5, 99.5]), others[:99]).value == 1.0
    assert membership(np.zeros(10), np.zeros(10))["tpr_at_1_percent_fpr"].value == 0.0


def test_an_overfit_adapter_is_beyond_the_threshold(
    phi_dir: Path, write_jsonl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Responses are random digits, so nothing but memory can lower their loss; the untrained adapter is at chance."""
    generator = random.Random(0)

    def rows(name: str) -> list[dict[str, str]]:
        numbers = [f"{generator.randrange(10**6):06d}" for _ in range(8)]
        return [
            {"id": f"{name}{n}", "instruction": f"{name} {n}", "response": number} for n, number in enumerate(numbers)
        ]

    train, val = write_jsonl(rows("a"), "train.jsonl"), write_jsonl(rows("b"), "val.jsonl")
    monkeypatch.chdir(tmp_path)
    settings = [f"--model.base={phi_dir}", "--model.dtype=float32", "--model.max_new_tokens=4", "--run_name=a"]
    settings += [f"--data.train_files={train}", f"--data.val_files={val}", "--trainer.accelerator=cpu"]
    fit = ["--model.learning_rate=0.03", "--model.lora_r=16", "--trainer.limit_val_batches=0"]
    assert main(["fit", *settings, *fit, "--trainer.max_epochs=12"]) == 0
    assert main(["audit", *settings, "--ckpt_path=last", "--what=leakage"]) == 3
    assert "can be told from those of val_files: AUC 1.000" in capsys.readouterr().err
    assert json.loads(next(tmp_path.rglob("audit_leakage.json")).read_text("utf-8"))["passed"] is False
    assert main(["audit", *settings, "--ckpt_path=last", "--what=leakage", "--max_auc=1"]) == 0
    assert main(["fit", *settings, "--model.learning_rate=1e-12", "--trainer.max_epochs=1"]) == 0
    assert main(["audit", *settings, "--ckpt_path=last", "--what=leakage"]) == 0
    assert "membership auc 0.500" in capsys.readouterr().out
