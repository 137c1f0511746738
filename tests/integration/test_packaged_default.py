"""The packaged default, whole: what a newcomer gets from the two commands of the README."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_phi2.cli.main import main

CONFIG = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    assert main(["fit", "--config", CONFIG, "--trainer.default_root_dir", str(root)]) == 0
    return root / "tiny" / "version_0"


@pytest.mark.slow
def test_the_loss_falls_by_a_fifth_and_every_curve_of_the_contract_is_there(run: Path) -> None:
    """The base has read such claims, though never the template, so it begins low: 0.27, and 0.20 after fit."""
    events = EventAccumulator(str(run))
    events.Reload()
    losses = [event.value for event in events.Scalars("val/loss")]
    assert events.Scalars("val/loss")[0].step == 0
    assert losses[-1] <= 0.8 * losses[0]
    assert {
        "train/loss",
        "train/grad_norm",
        "train/tokens_per_second",
        "train/supervised_tokens",
        "lr",
        "val/loss",
        "val/perplexity",
        "val/token_accuracy",
    } <= set(events.Tags()["scalars"])
    assert {f"samples/{index}/text_summary" for index in range(4)} <= set(events.Tags()["tensors"])


@pytest.mark.slow
def test_the_adapter_answers_with_the_facts_and_stops(run: Path) -> None:
    """Sixty test records, judged by `test`; the bounds leave room for another machine's rounding.

    The base knows the facts too, but goes on with the next request where it should stop.
    """
    assert main(["test", "--config", CONFIG, "--ckpt_path", str(run), "--max_completions", "60"]) == 0
    metrics = json.loads((run / "test_metrics.json").read_text("utf-8"))
    adapter, base, echo, nearest = (
        {name: row["mean"] for name, row in metrics["completions"][who].items()}
        for who in ("adapter", "base", "copy_prompt", "nearest")
    )
    assert adapter["eos_rate"] >= 0.85
    assert base["eos_rate"] < 0.6
    assert adapter["length ratio"] == pytest.approx(1, rel=0.2)
    assert adapter["repeated 8-gram"] < 0.25 < base["repeated 8-gram"]
    assert adapter["facts copied"] > 0.6
    assert adapter["facts known"] > 0.6
    assert adapter["fact recall"] > 0.15 + max(other["fact recall"] for other in (base, echo, nearest))
    assert metrics["test/loss"] < 1.0
