"""The packaged default, whole: what a newcomer gets from the two commands of the README."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_phi2.cli import main

CONFIG = str(Path(__file__).parent.parent / "configs" / "tiny.yaml")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    assert main(["fit", "--config", CONFIG, "--trainer.default_root_dir", str(root)]) == 0
    return root / "tiny" / "version_0"


@pytest.mark.slow
def test_the_loss_falls_by_a_quarter_and_every_curve_of_the_contract_is_there(run: Path) -> None:
    """The base has read such claims, though never the template, so it begins low: 0.474, and 0.300 after fit."""
    events = EventAccumulator(str(run))
    events.Reload()
    losses = [event.value for event in events.Scalars("val/loss")]
    assert events.Scalars("val/loss")[0].step == 0
    assert losses[-1] <= 0.75 * losses[0]
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
def test_the_adapter_answers_with_more_of_what_is_known_and_stops(run: Path) -> None:
    """Sixty test records, judged by `test`; the bounds leave room for another machine's rounding."""
    assert main(["test", "--config", CONFIG, "--ckpt_path", str(run), "--answers", "60"]) == 0
    metrics = json.loads((run / "test_metrics.json").read_text("utf-8"))
    adapter, base, nearest = (
        {name: row["mean"] for name, row in metrics["answers"][who].items()} for who in ("adapter", "base", "nearest")
    )
    assert adapter["ends by itself"] >= 0.85
    assert adapter["length ratio"] == pytest.approx(1, rel=0.25)
    assert adapter["facts known"] > base["facts known"]
    assert adapter["repeated 8-gram"] < base["repeated 8-gram"]
    assert adapter["fact recall"] > nearest["fact recall"]
    assert metrics["test/loss"] < 1.0
