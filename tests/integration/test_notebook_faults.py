"""The faults of a widely copied fine-tuning notebook, each shown to be absent here."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import new_data, new_module, new_trainer, weights_of
from lit_phi2.cli.main import main
from lit_phi2.data.collate import collate
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.errors import InputError
from lit_phi2.model import device
from lit_phi2.model.device import choose_dtype
from lit_phi2.types import IGNORE_INDEX, Batch

PHI2_PARAMETERS = 2_779_683_840

Records = list[dict[str, str]]


@pytest.fixture
def train_file(write_jsonl: Callable[..., Path], record_rows: Records) -> Path:
    return write_jsonl(record_rows)


def test_prompt_tokens_are_not_in_the_loss(phi_dir: Path, train_file: Path, record_rows: Records) -> None:
    """Reference: the labels that are not ignored decode to the response and its EOS token."""
    data = new_data(phi_dir, train_file)
    data.setup("fit")
    module = new_module(phi_dir)
    for index, record in enumerate(record_rows):
        batch = single_example(data, index)
        supervised = batch.labels[0] != IGNORE_INDEX
        assert data.tokenizer.decode(batch.labels[0][supervised]) == record["response"] + "<|endoftext|>"
        assert module.loss(batch).num_tokens == supervised.sum()


def single_example(data: ClaimsDataModule, index: int) -> Batch:
    return collate(data.splits["train"].examples, [(index,)])


def test_the_eos_token_is_learned(phi_dir: Path, train_file: Path) -> None:
    """With pad = EOS, masking by id hides EOS. Here EOS has a gradient: a step raises its bias in the output layer."""
    data = new_data(phi_dir, train_file)
    data.setup("fit")
    module = new_module(phi_dir)
    bias = module.fused_phi.lm_head.bias.requires_grad_()
    batch = single_example(data, 0)
    module.loss(batch).nats.backward()
    assert batch.labels[0, -1] == module.eos_token_id
    assert bias.grad[module.eos_token_id] < 0


def test_wqkv_is_adapted_and_not_only_fc1_and_fc2(phi_dir: Path, train_file: Path, tmp_path: Path) -> None:
    module = new_module(phi_dir)
    before = weights_of(module)
    new_trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, new_data(phi_dir, train_file))
    for target in ("Wqkv", "fc1", "fc2"):
        changed = [name for name, weight in weights_of(module).items() if not torch.equal(weight, before[name])]
        assert sum(f".{target}." in name for name in changed) == 2 * 2, "A and B in both layers"


def test_auto_is_bfloat16_where_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5 loads Phi-2 in float16 by default; what float16 does here is in training/test_float16.py."""
    monkeypatch.setattr(device, "cpu_bf16_instructions", lambda: "AMX")
    assert choose_dtype("auto", torch.device("cpu"), PHI2_PARAMETERS)[0] == torch.bfloat16


def test_the_adapter_is_saved(phi_dir: Path, train_file: Path, tmp_path: Path) -> None:
    module = new_module(phi_dir)
    new_trainer(tmp_path, keep=True, max_steps=2).fit(module, new_data(phi_dir, train_file))
    saved = load_file(tmp_path / "run" / "version_0" / "adapter" / "adapter_model.safetensors")
    lora_b = [weight for name, weight in saved.items() if "lora_B" in name]
    assert len(lora_b) == 2 * 5, "q, k, v, fc1 and fc2 in both layers"
    assert all(weight.any() for weight in lora_b)


def test_there_is_a_validation_before_and_after_training(phi_dir: Path, train_file: Path, tmp_path: Path) -> None:
    losses: list[float] = []
    module = new_module(phi_dir)
    module.log_scalars = lambda values, step=None: losses.extend(
        value for name, value in values.items() if name == "val/loss"
    )
    new_trainer(tmp_path, max_epochs=3, num_sanity_val_steps=-1).fit(
        module, new_data(phi_dir, train_file, max_length=128)
    )
    assert len(losses) == 4
    assert losses[-1] < losses[0]


def test_max_new_tokens_does_not_count_the_prompt(phi_dir: Path) -> None:
    module = new_module(phi_dir)
    with torch.no_grad():
        module.fused_phi.lm_head.bias[module.eos_token_id] = -1e4  # never predicts EOS
    short, long = module.generate([[5, 6], list(range(5, 105))])
    assert len(short.ids) == len(long.ids) == module.max_new_tokens


def test_a_prediction_does_not_repeat_the_prompt(
    phi_dir: Path, train_file: Path, tmp_path: Path, record_rows: Records
) -> None:
    output = tmp_path / "predictions.jsonl"
    arguments = ["predict", "--model.base", str(phi_dir), "--model.max_new_tokens", "8", "--output", str(output)]
    assert main([*arguments, "--data.predict_files", str(train_file), "--trainer.accelerator", "cpu"]) == 0
    predictions = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(predictions) == len(record_rows)
    assert not any("###" in row["completion"] or row["instruction"] in row["completion"] for row in predictions)


def test_metrics_cover_every_token_of_every_reference(
    phi_dir: Path, train_file: Path, tmp_path: Path, record_rows: Records
) -> None:
    """An empty reference is refused, and the mean covers every token of the other references."""
    data = new_data(phi_dir, train_file, test_files=str(train_file))
    module = new_module(phi_dir)
    num_tokens: list[float] = []
    update = module.eval_sums["num_tokens"].update
    module.eval_sums["num_tokens"].update = lambda value: num_tokens.append(float(value)) or update(value)
    new_trainer(tmp_path).test(module, data)
    references = [data.tokenizer(record["response"])["input_ids"] for record in record_rows]
    assert sum(num_tokens) == sum(len(reference) + 1 for reference in references)

    empty = tmp_path / "empty.jsonl"
    empty.write_text(json.dumps({"instruction": "Why?", "response": ""}) + "\n")
    with pytest.raises(InputError, match="'response' is empty"):
        new_trainer(tmp_path).test(module, new_data(phi_dir, train_file, test_files=str(empty)))
