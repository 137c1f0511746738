"""The packaged default, whole: what a newcomer gets from the two commands of the README."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_phi2.base import find_base, load_tokenizer
from lit_phi2.cli import main

CONFIG = str(Path(__file__).parent.parent / "configs" / "tiny.yaml")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    assert main(["fit", "--config", CONFIG, "--trainer.default_root_dir", str(root)]) == 0
    return root / "tiny" / "version_0"


@pytest.mark.slow
def test_the_loss_falls_by_half_a_nat_and_every_curve_of_the_contract_is_there(run: Path) -> None:
    events = EventAccumulator(str(run))
    events.Reload()
    losses = [event.value for event in events.Scalars("val/loss")]
    assert events.Scalars("val/loss")[0].step == 0
    assert losses[0] - losses[-1] >= 0.5
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
def test_the_adapter_learns_to_stop_and_to_be_as_long_as_the_references(run: Path, tmp_path: Path) -> None:
    """On all packaged validation records; lengths in tokens, against the references tokenized by hand."""
    output = tmp_path / "predictions.jsonl"
    files = ["--data.predict_files", "claims:validation", "--output", str(output)]
    assert main(["predict", "--config", CONFIG, "--ckpt_path", str(run), *files]) == 0
    predictions = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert len(predictions) >= 50
    stopped = sum(prediction["finish_reason"] == "stop" for prediction in predictions)
    assert stopped / len(predictions) >= 0.95
    tokenizer = load_tokenizer(find_base("tiny"))
    wanted = sum(len(tokenizer(prediction["response"])["input_ids"]) for prediction in predictions)
    assert sum(prediction["new_tokens"] for prediction in predictions) == pytest.approx(wanted, rel=0.25)
