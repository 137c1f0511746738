"""What an export is checked on, and what the card says of the run."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from helpers import new_data, new_module, new_trainer
from lit_phi2 import LitPhi2
from lit_phi2.adapters.adapter import Adapter
from lit_phi2.adapters.peft_format import save_adapter
from lit_phi2.errors import InputError
from lit_phi2.export.exporter import plan_export
from lit_phi2.pretrained import resolve_base_model
from lit_phi2.training.exporting import card_facts, held_out_prompts, run_and_release


@pytest.fixture(scope="module")
def adapter(phi_dir: Path) -> Adapter:
    return new_module(phi_dir).trained_adapter()


def test_prompts_are_spread_over_the_records(phi_dir: Path, train_file: Path) -> None:
    """Of twelve records three: the first, the fifth and the ninth, without their responses."""
    data = new_data(phi_dir, train_file)
    prompts = held_out_prompts(data, 3, 512)
    examples = data.splits["val"].examples
    assert prompts == [examples[index].ids[: examples[index].prompt_length] for index in (0, 4, 8)]


def test_a_prompt_leaves_space_for_its_completion(phi_dir: Path, train_file: Path) -> None:
    """Of 32 tokens; without any such prompt, the message says how to export nevertheless."""
    data = new_data(phi_dir, train_file)
    lengths = sorted(len(prompt) for prompt in held_out_prompts(data, 12, 512))
    assert lengths[0] < lengths[6]
    short = held_out_prompts(data, 12, lengths[6] + 32)
    assert sorted(map(len, short)) == [length for length in lengths if length <= lengths[6]]
    with pytest.raises(InputError, match="--check 0"):
        held_out_prompts(data, 12, lengths[0] + 31)


def test_the_reference_is_what_the_model_generates(phi_dir: Path, adapter: Adapter, tmp_path: Path) -> None:
    """Reference: generate of the same adapter in a module."""
    save_adapter(adapter, tmp_path / "adapter")
    base = resolve_base_model(str(phi_dir))
    plan = plan_export(adapter, base, tmp_path / "out", format="peft", dtype=None, source="adapter")
    prompts = [[5, 6, 7], [8, 9]]
    cpu = torch.device("cpu")
    reference = run_and_release(plan, str(tmp_path / "adapter"), prompts, dtype="float32", device=cpu)
    module = new_module(phi_dir).eval()
    expected = [completion.ids for completion in module.generate(prompts, 32)]
    assert [ids[: len(other)] for ids, other in zip(reference.completions, expected, strict=True)] == expected
    assert reference.dtype == "float32"
    assert reference.adapter_effect > 0


def test_numbers_are_told_only_of_the_runs_own_records(
    phi_dir: Path, train_file: Path, adapter: Adapter, tmp_path: Path
) -> None:
    """Another --data.train_files, or records that are gone, leave the card without numbers."""
    save_adapter(adapter, tmp_path / "run" / "adapter")
    data = new_data(phi_dir, train_file)
    config = {"data": {"train_files": str(train_file), "val_files": str(train_file)}}
    file = tmp_path / "run" / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    (tmp_path / "run" / "test_metrics.json").write_text(json.dumps({"test/loss": 1.5, "completions": {"a": 1}}))
    facts = card_facts(tmp_path / "run" / "adapter", data)
    assert facts.data_counts == {"train": 12, "val": 12}
    assert facts.metrics == {"test/loss": 1.5}
    assert facts.config == config
    other = new_data(phi_dir, train_file, val_files="claims:validation")
    assert card_facts(tmp_path / "run" / "adapter", other).data_counts == {}
    gone = {"train_files": "gone.jsonl", "val_files": str(train_file)}
    file.write_text(yaml.safe_dump({"data": gone}))
    data.files["train"] = "gone.jsonl"
    data.splits.clear()
    assert card_facts(tmp_path / "run" / "adapter", data).data_counts == {}
    for damaged in ("data: [", "- 1", "data: 3"):
        file.write_text(damaged)
        assert card_facts(tmp_path / "run" / "adapter", data).data_counts == {}


def test_a_program_exports_the_best_of_a_run_folder(phi_dir: Path, train_file: Path, tmp_path: Path) -> None:
    """With the settings of the adapter, whatever the module has."""
    model = LitPhi2(base=str(phi_dir), dtype="float32", max_new_tokens=8, lora_r=3, learning_rate=0.01)
    new_trainer(tmp_path, max_steps=1, keep=True, enable_checkpointing=True).fit(model, new_data(phi_dir, train_file))
    run = next(tmp_path.glob("*/version_0"))
    other = LitPhi2(base=str(phi_dir), dtype="float32", max_new_tokens=8)
    out = str(tmp_path / "out")
    new_trainer(tmp_path).export(other, new_data(phi_dir, train_file), ckpt_path=str(run), output_dir=out, check=1)
    assert json.loads((tmp_path / "out" / "export.json").read_text())["check"]["equal_completions"] == 1
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 3
