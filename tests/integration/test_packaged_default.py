"""The packaged default: what its fit and its test leave, on a part of its records, for time."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers import TINY_CONFIG
from lit_phi2.cli.main import main

CONFIG = str(TINY_CONFIG)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    part = ["--data.train_files", "claims:train[:300]", "--data.val_files", "claims:validation[:100]"]
    assert main(["fit", "--config", CONFIG, *part, "--trainer.default_root_dir", str(root)]) == 0
    return root / "tiny" / "version_0"


def test_the_loss_falls_by_a_fifth_and_every_scalar_is_logged(run: Path) -> None:
    """The base was pretrained on such claims without the template, so val/loss starts low, at 0.4."""
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


def test_completions_of_the_adapter_hold_the_facts_and_stop(run: Path) -> None:
    """Forty test records, scored by `test`; the bounds allow for another machine's rounding.

    The base knows the facts too, but writes another request where it should stop.
    """
    forty = ["--data.test_files", "claims:test[:40]"]
    assert main(["test", "--config", CONFIG, "--ckpt_path", str(run), *forty]) == 0
    metrics = json.loads((run / "test_metrics.json").read_text("utf-8"))
    adapter, base, copy_prompt, nearest = (
        {name: row["mean"] for name, row in metrics["completions"][system].items()}
        for system in ("adapter", "base", "copy_prompt", "nearest")
    )
    assert adapter["eos_rate"] >= 0.85
    assert base["eos_rate"] < 0.6
    assert adapter["length ratio"] == pytest.approx(1, rel=0.2)
    assert adapter["repeated 8-gram"] < 0.25 < base["repeated 8-gram"]
    assert adapter["facts copied"] > 0.6
    assert adapter["facts known"] > 0.6
    assert adapter["fact recall"] > 0.15 + max(other["fact recall"] for other in (base, copy_prompt, nearest))
    assert metrics["test/loss"] < 1.0
