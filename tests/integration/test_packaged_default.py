"""The packaged default: what its fit and its test leave, on a part of its records, for time."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers import TINY_CONFIG
from lit_phi2.cli.main import main


@pytest.mark.slow
def test_the_packaged_default_learns_the_facts_and_to_stop(tmp_path: Path) -> None:
    """One test, so that it trains once. The bounds allow for another machine's rounding."""
    common = ["--config", str(TINY_CONFIG), "--model.max_new_tokens=256"]  # most responses have fewer than 200
    part = ["--data.train_files", "claims:train[:160]", "--data.val_files", "claims:validation[:100]"]
    assert main(["fit", *common, *part, "--trainer.default_root_dir", str(tmp_path)]) == 0
    run = tmp_path / "tiny" / "version_0"
    check_curves(run)
    assert main(["test", *common, "--ckpt_path", str(run), "--data.test_files", "claims:test[:16]"]) == 0
    check_completions(json.loads((run / "test_metrics.json").read_text("utf-8")))


def check_curves(run: Path) -> None:
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


def check_completions(metrics: dict) -> None:
    """The base knows the facts too, but writes another request where it should stop."""
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
