"""LitPhi2: what it trains, in which dtypes, with which dropout, and what stops a step."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers import new_data, new_module, new_trainer, weights_of
from lit_phi2.errors import NonFiniteError
from lit_phi2.model import kernels
from lit_phi2.model.lora import FusedLoraLinear, trainable_parameters
from lit_phi2.training.module import LitPhi2


def test_training_draws_from_every_dropout_validation_from_none(
    phi_dir: Path, train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: forward hooks. A LoRA layer samples its own dropout, so the test compares its output with
    W x + bias + B A x. A block samples its dropout in one kernel for both parts, so the masks are counted there."""
    module = new_module(phi_dir, dropout=True, lora_dropout=0.3)
    drawn: dict[str, set[str]] = {"train": set(), "eval": set()}
    names = {layer: name for name, layer in module.named_modules() if isinstance(layer, nn.Dropout) and layer.p > 0}

    def watch(layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        expected = layer.base_layer(inputs[0]) + 2 * layer.lora_B["default"](layer.lora_A["default"](inputs[0]))
        if not torch.allclose(output, expected, atol=1e-5):
            drawn["train" if module.trainer.training else "eval"].add(names[layer.lora_dropout["default"]])

    block_masks: list[tuple[bool, float]] = []  # in training or not, and the fraction of elements kept
    dropout_mask = kernels.dropout_mask

    def record_mask(like: torch.Tensor, drop_per_65536: int, seed: int) -> torch.Tensor:
        mask = dropout_mask(like, drop_per_65536, seed)
        block_masks.append((module.trainer.training, mask.float().mean().item()))
        return mask

    monkeypatch.setattr(kernels, "dropout_mask", record_mask)
    for layer in module.modules():
        if isinstance(layer, FusedLoraLinear):
            layer.register_forward_hook(watch)
    data = new_data(phi_dir, train_file)
    new_trainer(tmp_path, max_steps=1, num_sanity_val_steps=-1).fit(module, data)
    # Each of two blocks has its resid_dropout, and LoRA's on Wqkv, fc1 and fc2.
    assert len(names) == 2 * (1 + 3)
    assert drawn["train"] == {name for name in names.values() if "lora_dropout" in name}
    assert len(block_masks) == 2 * 2 * 2  # attention and MLP of two blocks, in forward and in backward
    assert all(training and abs(kept - 0.9) < 0.02 for training, kept in block_masks)
    assert not drawn["eval"]


def test_only_lora_weights_are_trained(phi_dir: Path, train_file: Path, tmp_path: Path) -> None:
    module = new_module(phi_dir)
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    new_trainer(tmp_path, max_steps=2).fit(module, new_data(phi_dir, train_file))
    changed = {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    (optimizer,) = module.trainer.optimizers
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(parameter) for name, parameter in module.named_parameters() if "lora_" in name
    }


def test_lora_is_float32_and_the_base_in_the_compute_dtype(phi_dir: Path) -> None:
    module = new_module(phi_dir, dtype="bfloat16")
    for name, parameter in module.named_parameters():
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16), name
        assert parameter.requires_grad == ("lora_" in name)


@pytest.mark.parametrize("source", ["loss", "gradient"])
def test_a_non_finite_step_is_not_taken_and_names_its_records(
    source: str, phi_dir: Path, train_file: Path, tmp_path: Path
) -> None:
    module = new_module(phi_dir)
    data = new_data(phi_dir, train_file, packing=False)
    assert module.phi is not None
    if source == "loss":
        with torch.no_grad():
            module.fused_phi.lm_head.bias[7] = math.nan
    else:
        parameter = next(iter(trainable_parameters(module.phi).values()))
        parameter.register_hook(lambda gradient: gradient * math.inf)
    before = weights_of(module)
    with pytest.raises(NonFiniteError, match=r"step 1: .* not taken\. The records in it: \S+:\d+, \S+:\d+$") as error:
        new_trainer(tmp_path, accumulate_grad_batches=2, limit_val_batches=0).fit(module, data)
    assert error.value.exit_code == 1
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(module).items())


def test_the_base_dropout_is_active_after_a_validation(phi_dir: Path, train_file: Path, tmp_path: Path) -> None:
    """from_pretrained returns eval mode and Lightning keeps the modes it finds."""
    module = new_module(phi_dir, dropout=True)
    new_trainer(tmp_path, max_steps=2, num_sanity_val_steps=-1, val_check_interval=1).fit(
        module, new_data(phi_dir, train_file)
    )
    assert all(layer.training for layer in module.modules() if isinstance(layer, nn.Dropout))


def test_generation_restores_modes_flags_and_random_state(phi_dir: Path) -> None:
    module = new_module(phi_dir, dropout=True)
    module.fused_phi.model.layers[0].eval()  # mixed modes
    modes = {name: layer.training for name, layer in module.named_modules()}
    config = module.fused_phi.config.to_dict(), module.fused_phi.generation_config.to_dict()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    module.generate([[1, 2, 3], [4, 5]])
    assert torch.equal(torch.rand(1), expected)
    assert {name: layer.training for name, layer in module.named_modules()} == modes
    assert (module.fused_phi.config.to_dict(), module.fused_phi.generation_config.to_dict()) == config


def test_completions_exclude_prompt_and_eos_token(phi_dir: Path) -> None:
    """The output layer always predicts token 7, and afterwards always EOS."""
    module = new_module(phi_dir)
    head = module.fused_phi.lm_head
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
        head.bias[7] = 1.0
    prompts = [[3, 4, 5, 6, 8, 9], [3]]
    completions = module.generate(prompts)
    assert [completion.ids for completion in completions] == [[7] * 8, [7] * 8]  # max_new_tokens excludes the prompt
    assert [completion.finish_reason for completion in completions] == ["length", "length"]
    with torch.no_grad():
        head.bias[module.eos_token_id] = 2.0
    completions = module.generate(prompts)
    assert [(completion.ids, completion.finish_reason) for completion in completions] == [([], "stop")] * 2


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"limit_train_batches": 3, "accumulate_grad_batches": 2}, 2),
        ({"limit_train_batches": 0.5, "accumulate_grad_batches": 3}, 2),
        ({"limit_train_batches": 1.0, "accumulate_grad_batches": 7}, 2),
    ],
)
def test_loss_weights_of_a_window_sum_to_one_under_any_limit(
    settings: dict[str, Any], steps: int, phi_dir: Path, train_file: Path, tmp_path: Path
) -> None:
    """Reference: uniform logits give a loss of ln V per token, so a window whose weights sum to one gives ln V."""
    module = new_module(phi_dir)
    with torch.no_grad():
        module.fused_phi.lm_head.weight.zero_()
        module.fused_phi.lm_head.bias.zero_()
    losses: list[float] = []
    inner_step = module.training_step

    def training_step(batch: Any, batch_idx: int) -> torch.Tensor:
        loss = inner_step(batch, batch_idx)
        losses.append(loss.item() / settings["accumulate_grad_batches"])  # what Lightning divides by
        return loss

    module.training_step = training_step  # type: ignore[method-assign]
    trainer = new_trainer(tmp_path, limit_val_batches=0, **settings)
    trainer.fit(module, new_data(phi_dir, train_file, packing=False))
    size = settings["accumulate_grad_batches"]
    windows = [sum(losses[start : start + size]) for start in range(0, len(losses), size)]
    assert trainer.global_step == steps == len(windows)
    vocab_size = module.fused_phi.config.vocab_size
    assert windows == pytest.approx([math.log(vocab_size)] * steps, rel=1e-5)


def test_a_run_starts_from_an_adapter_or_a_checkpoint(phi_dir: Path, train_file: Path, tmp_path: Path) -> None:
    first = new_module(phi_dir)
    new_trainer(tmp_path, keep=True, max_steps=2).fit(first, new_data(phi_dir, train_file))
    folder = tmp_path / "run" / "version_0"
    for source in (folder / "adapter", folder / "checkpoints" / "last.ckpt"):
        second = LitPhi2(base=str(phi_dir), adapter=str(source), dtype="float32", lora_r=4, lora_alpha=8)
        second.configure_model()
        assert all(torch.equal(weight, weights_of(first)[name]) for name, weight in weights_of(second).items())
