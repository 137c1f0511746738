"""Parity with plain transformers and plain PEFT, in float32 on the CPU.

The reference is written here and uses none of our code: transformers' own Phi, PEFT on q_proj, k_proj, v_proj, fc1 and
fc2, the same starting weights, transformers' own loss, one example at a time.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoTokenizer, PhiForCausalLM

from helpers import Gradients, new_data, new_module, new_trainer, relative_difference, weights_of
from lit_phi2.adapters.peft_format import save_adapter, split_qkv
from lit_phi2.data.collate import collate
from lit_phi2.model.phi2 import packed_forward
from lit_phi2.training.module import LitPhi2
from lit_phi2.types import IGNORE_INDEX


def reference_model(folder: Path, module: LitPhi2) -> PeftModel:
    """Native Phi with PEFT, its adapter copied from ours: A three times, rows of B in three parts."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "fc1", "fc2"])
    model = get_peft_model(PhiForCausalLM.from_pretrained(folder, dtype=torch.float32), config)
    width = 64
    ours = dict(module.phi.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                continue
            for index, projection in enumerate(("q_proj", "k_proj", "v_proj")):
                if projection in name:
                    fused = ours[name.replace(projection, "Wqkv")]
                    parameter.copy_(fused if "lora_A" in name else fused[index * width : (index + 1) * width])
                    break
            else:
                parameter.copy_(ours[name])
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return model


def read_examples(records: list[dict[str, str]], folder: Path) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, response ids with the end token) of each record, by hand."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples = []
    for record in records:
        section = f"### Input:\n{record['input']}\n\n" if record["input"] else ""
        prompt = f"### Instruction:\n{record['instruction']}\n\n{section}### Response:\n"
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, record["response"])]
        examples.append((ids[0], [*ids[1], tokenizer.eos_token_id]))
    return examples


def reference_step(model: PeftModel, examples: list[tuple[list[int], list[int]]]) -> tuple[float, dict[str, Tensor]]:
    """Mean loss over supervised tokens, and its gradients: one by one, by transformers' loss, weighted by token."""
    total = sum(len(response) for _, response in examples)
    mean = 0.0
    for prompt, response in examples:
        labels = torch.tensor([[-100] * len(prompt) + response])
        loss = model(input_ids=torch.tensor([prompt + response]), labels=labels).loss
        (loss * len(response) / total).backward()
        mean += loss.item() * len(response) / total
    gradients: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        name = name.replace(".default.", ".")
        for projection in ("q_proj", "k_proj", "v_proj"):
            name = name.replace(projection, "Wqkv")
        if name in gradients and "lora_A" in name:
            gradients[name] = gradients[name] + parameter.grad  # the fused A gets the sum of the three
        elif name in gradients:
            gradients[name] = torch.cat([gradients[name], parameter.grad])
        else:
            gradients[name] = parameter.grad.clone()
    return mean, gradients


def test_logits_equal_those_of_native_phi_with_peft(phi_dir: Path) -> None:
    """Within 1e-5 of the largest |logit|: float32, so only the order of summation differs."""
    module = new_module(phi_dir)
    reference = reference_model(phi_dir, module)
    ids = torch.arange(40)[None] * 7 % 500
    with torch.no_grad():
        expected = reference(input_ids=ids).logits
        hidden = packed_forward(module.fused_phi, ids, torch.arange(40)[None])
        logits = module.fused_phi.lm_head(hidden)
    assert expected.abs().max() > 1  # not almost zero
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("packing", "batch_size", "accumulate"),
    [(False, 8, 1), (False, 4, 2), (False, 2, 4), (False, 1, 8), (True, 4, 1), (True, 2, 2), (True, 1, 4)],
)
def test_a_step_equals_examples_run_one_by_one(
    packing: bool,
    batch_size: int,
    accumulate: int,
    phi_dir: Path,
    record_rows: list[dict[str, str]],
    write_jsonl: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Loss and every gradient of a Trainer's step, all tokens weighted alike, within 1e-5 in relative norm: the order
    of summation alone moves 1e-6."""
    records = record_rows[:8]
    module = new_module(phi_dir)
    reference_loss, reference = reference_step(reference_model(phi_dir, module), read_examples(records, phi_dir))
    data = new_data(phi_dir, write_jsonl(records), packing=packing, batch_size=batch_size)
    gradients = Gradients()
    curves: dict[str, float] = {}
    module.log_scalars = lambda values, step=None: curves.update(values)  # type: ignore[method-assign]
    new_trainer(tmp_path, [gradients], accumulate_grad_batches=accumulate, limit_val_batches=0).fit(module, data)

    assert len(gradients.steps) == 1, "each setting above makes one window of all eight records"
    assert set(gradients.steps[0]) == set(reference)
    assert len(reference) == 2 * 3 * 2, "A and B of three targets in two layers"
    for name, expected in reference.items():
        assert relative_difference(gradients.steps[0][name], expected) < 1e-5, name
    assert curves["train/loss"] == pytest.approx(reference_loss, rel=1e-5)
    assert curves["train/supervised_tokens"] == sum(len(response) for _, response in read_examples(records, phi_dir))


def test_changing_one_example_of_a_row_changes_no_other(phi_dir: Path) -> None:
    """1e-6: the same products in the same order, except for the zeros of the masked part."""
    module = new_module(phi_dir)
    lengths = [9, 14, 11]
    ids = torch.randint(0, 500, (1, sum(lengths)), generator=torch.Generator().manual_seed(3))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    changed = ids.clone()
    changed[0, 9:23] = (changed[0, 9:23] + 1) % 500
    with torch.no_grad():
        before = packed_forward(module.fused_phi, ids, positions)
        after = packed_forward(module.fused_phi, changed, positions)
    assert (before[0, 9:23] - after[0, 9:23]).abs().max() > 0.1
    torch.testing.assert_close(after[0, :9], before[0, :9], rtol=0, atol=1e-6)
    torch.testing.assert_close(after[0, 23:], before[0, 23:], rtol=0, atol=1e-6)


def test_packed_examples_match_examples_run_alone(
    phi_dir: Path, record_rows: list[dict[str, str]], write_jsonl: Callable[..., Path]
) -> None:
    """Reference: transformers' native Phi on each example by itself; float32, so only summation order differs."""
    data = new_data(phi_dir, write_jsonl(record_rows))
    data.setup("fit")
    module = new_module(phi_dir)
    reference = reference_model(phi_dir, module)
    examples = data.splits["train"].examples
    batch = collate(examples, [(0, 3, 1), (2,), (5, 4)])
    with torch.no_grad():
        logits = module.fused_phi.lm_head(packed_forward(module.fused_phi, batch.input_ids, batch.position_ids))
        for line, row in enumerate([(0, 3, 1), (2,), (5, 4)]):
            start = 0
            for index in row:
                length = len(examples[index].ids)
                alone = reference(input_ids=torch.tensor([examples[index].ids])).logits[0]
                packed = logits[line, start : start + length]
                torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5 * alone.abs().max().item())
                start += length
    assert (batch.labels != IGNORE_INDEX).any()


def test_plain_peft_gives_an_exported_adapter_our_logits(phi_dir: Path, tmp_path: Path) -> None:
    """Reference: PeftModel.from_pretrained on transformers' native Phi, from the files alone."""
    module = new_module(phi_dir)
    save_adapter(module.trained_adapter(), tmp_path)
    native = PhiForCausalLM.from_pretrained(phi_dir, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(native, str(tmp_path))
    ids = torch.arange(30)[None] * 11 % 500
    with torch.no_grad():
        expected = loaded(input_ids=ids).logits
        base = loaded.get_base_model()
        logits = module.fused_phi.lm_head(packed_forward(module.fused_phi, ids, torch.arange(30)[None]))
        with loaded.disable_adapter():
            base_logits = base(input_ids=ids).logits
    assert (expected - base_logits).abs().max() > 0.01, "an adapter without effect would prove nothing"
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4
    assert set(split_qkv(weights_of(module))) == {
        name.replace(".default.", ".") for name, _ in loaded.named_parameters() if "lora_" in name
    }


def test_predict_generates_what_plain_peft_generates(
    phi_dir: Path, record_rows: list[dict[str, str]], write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    """Greedy text of the exported adapter under plain PEFT, prompt by prompt, without padding or cache.

    Equal wherever the two best logits differ by more than 1e-4; a closer pair may fall either way.
    """
    module = new_module(phi_dir)
    save_adapter(module.trained_adapter(), tmp_path / "adapter")
    native = PhiForCausalLM.from_pretrained(phi_dir, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(native, str(tmp_path / "adapter")).eval()
    data = new_data(phi_dir, write_jsonl(record_rows))
    output = tmp_path / "predictions.jsonl"
    new_trainer(tmp_path).predict(module, data, output=str(output))
    predictions = [json.loads(line) for line in output.read_text("utf-8").splitlines()]

    assert [prediction["id"] for prediction in predictions] == [record["id"] for record in record_rows]
    tokenizer = AutoTokenizer.from_pretrained(phi_dir)
    compared = 0
    for prediction, (prompt, _) in zip(predictions, read_examples(record_rows, phi_dir), strict=True):
        ids, completion, is_decided = list(prompt), [], True
        for _ in range(8):
            with torch.no_grad():
                best = loaded(input_ids=torch.tensor([ids])).logits[0, -1].topk(2)
            is_decided = is_decided and (best.values[0] - best.values[1]).item() > 1e-4
            token = int(best.indices[0])
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
            completion.append(token)
        if is_decided:
            compared += 1
            assert prediction["completion"] == tokenizer.decode(completion)
            assert prediction["new_tokens"] == len(completion)
            assert prediction["finish_reason"] == ("stop" if len(completion) < 8 else "length")
    assert compared >= len(record_rows) // 2
