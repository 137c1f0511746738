"""What a run does: dropout, curves, samples, what stops it, and what it leaves behind."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from helpers import Gradients, new_data, new_module, new_trainer, weights_of
from lit_phi2.adapters.checkpoint import read_adapter
from lit_phi2.errors import InputError, NonFiniteError
from lit_phi2.model import kernels as elementwise
from lit_phi2.model.lora import FusedLoraLinear, trainable_parameters
from lit_phi2.training.callbacks.samples import SampleWriter
from lit_phi2.training.module import LitPhi2
from lit_phi2.training.optim import warmup_then_cosine

Jsonl = Callable[..., Path]
Records = list[dict[str, str]]


@pytest.fixture
def train_file(write_jsonl: Jsonl, some_records: Records) -> Path:
    return write_jsonl(some_records)


def read_curves(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_a_step_draws_from_every_dropout_and_validation_from_none(
    phi_dir: Path, train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: forward hooks. The dropout of a LoRA layer, which draws it itself, has drawn where the output is not
    W x + bias + B A x. That of a block is drawn for its two parts at once, and counted where it is."""
    module = new_module(phi_dir, dropout=True, lora_dropout=0.3)
    drawn = {"train": set(), "eval": set()}
    names = {layer: name for name, layer in module.named_modules() if isinstance(layer, nn.Dropout) and layer.p > 0}

    def watch(layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        x = inputs[0]
        expected = layer.base_layer(x) + 2 * layer.lora_B["default"](layer.lora_A["default"](x))
        if not torch.allclose(output, expected, atol=1e-5):
            drawn["train" if module.trainer.training else "eval"].add(names[layer.lora_dropout["default"]])

    of_blocks: list[tuple[bool, float]] = []  # whether in training, and the share that is kept
    kept = elementwise._sample_dropout_mask

    def count(like: torch.Tensor, dropped: int) -> torch.Tensor:
        keep = kept(like, dropped)
        of_blocks.append((module.trainer.training, keep.float().mean().item()))
        return keep

    monkeypatch.setattr(elementwise, "_kept", count)
    for layer in module.modules():
        if isinstance(layer, FusedLoraLinear):
            layer.register_forward_hook(watch)
    data = new_data(phi_dir, train_file)
    new_trainer(tmp_path, max_steps=1, num_sanity_val_steps=-1).fit(module, data)
    # In each of two layers: resid_dropout of the block, and LoRA's on Wqkv, fc1 and fc2.
    assert len(names) == 2 * (1 + 3)
    assert drawn["train"] == {name for name in names.values() if "lora_dropout" in name}
    assert len(of_blocks) == 2 * 2  # attention's and the MLP's part
    assert all(training and abs(share - 0.9) < 0.02 for training, share in of_blocks)
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


def test_learning_rate_warms_up_and_falls_as_a_cosine_over_the_planned_steps(
    phi_dir: Path, train_file: Path, tmp_path: Path
) -> None:
    """Reference: the closed form, at every step of two epochs; the steps are counted by hand from the rows."""
    module = new_module(phi_dir, learning_rate=1e-3, warmup_ratio=0.25)
    data = new_data(phi_dir, train_file, packing=False)
    rates: list[float] = []
    module.log_scalars = lambda curves, step=None: rates.extend([curves["lr"]] if "lr" in curves else [])  # type: ignore[method-assign]
    new_trainer(tmp_path, max_epochs=2, accumulate_grad_batches=5, limit_val_batches=0).fit(module, data)
    steps = 2 * 3  # 12 records, 5 to a window: 5, 5 and 2, twice
    warmup = 2  # a quarter of 6, rounded up
    expected = [1e-3 * (step + 1) / warmup for step in range(warmup)]
    expected += [1e-3 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) for step in range(2, steps)]
    assert rates == pytest.approx(expected)
    assert warmup_then_cosine(steps, warmup_steps=warmup, total_steps=steps) == 0


def test_gradients_are_clipped_to_the_configured_norm(phi_dir: Path, train_file: Path, tmp_path: Path) -> None:
    """Reference: the gradient that AdamW sees, read from its first moment after one step: 0.1 x gradient."""
    module = new_module(phi_dir)
    gradients = Gradients()
    new_trainer(tmp_path, [gradients], max_steps=1, gradient_clip_val=0.01).fit(module, new_data(phi_dir, train_file))
    (optimizer,) = module.trainer.optimizers
    seen = torch.cat([state["exp_avg"].flatten() / 0.1 for state in optimizer.state.values()])
    before = torch.cat([gradient.flatten() for gradient in gradients.steps[0].values()])
    assert before.norm() > 0.1
    assert seen.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_a_run_with_and_without_samples_ends_in_the_same_weights(
    phi_dir: Path, train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with dropout on: samples change no mode, no cache flag and no random stream."""
    ends = []
    for samples in (True, False):
        if not samples:
            monkeypatch.setattr(SampleWriter, "on_validation_end", lambda self, trainer, pl_module: None)
        module = new_module(phi_dir, dropout=True, lora_dropout=0.2)
        new_trainer(tmp_path, max_epochs=2, num_sanity_val_steps=-1).fit(module, new_data(phi_dir, train_file))
        ends.append(weights_of(module))
        assert (tmp_path / "run" / f"version_{1 - samples:d}" / "samples.jsonl").is_file() == samples
    for name, weight in ends[0].items():
        assert torch.equal(weight, ends[1][name]), name


def test_a_run_leaves_curves_samples_checkpoints_and_adapter(phi_dir: Path, train_file: Path, tmp_path: Path) -> None:
    module = new_module(phi_dir)
    start = weights_of(module)
    trainer = new_trainer(tmp_path, keep=True, max_epochs=2, num_sanity_val_steps=-1, accumulate_grad_batches=2)
    trainer.fit(module, new_data(phi_dir, train_file))
    folder = tmp_path / "run" / "version_0"
    curves = read_curves(folder)

    steps = trainer.global_step
    assert steps > 2
    for tag in ("train/loss", "train/grad_norm", "train/tokens_per_second", "train/supervised_tokens", "lr"):
        assert [event.step for event in curves.Scalars(tag)] == list(range(1, steps + 1)), tag
    for tag in ("val/loss", "val/perplexity", "val/token_accuracy"):
        assert [event.step for event in curves.Scalars(tag)] == [0, steps // 2, steps], tag
    assert [event.step for event in curves.Tensors("samples/0/text_summary")] == [0, steps // 2, steps]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text("utf-8").splitlines()]
    assert [sample["step"] for sample in samples] == [0] * 4 + [steps // 2] * 4 + [steps] * 4
    assert {path.name for path in folder.iterdir()} == {
        "adapter",
        "checkpoints",
        "config.yaml",
        "samples.jsonl",
        next(folder.glob("events.out.tfevents*")).name,
    }
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}

    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert set(last["state_dict"]) == set(start), "the adapter and nothing of the base"
    assert all(torch.equal(weight, last["state_dict"][name]) for name, weight in weights_of(module).items())
    values = [event.value for event in curves.Scalars("val/loss")][1:]
    best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] == (steps if values[1] < values[0] else steps // 2)
    exported = read_adapter(folder / "adapter").weights
    assert all(torch.equal(weight, exported[name]) for name, weight in best["state_dict"].items())
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in load_file(
        folder / "adapter" / "adapter_model.safetensors"
    )


def test_validation_loss_is_the_mean_over_tokens(
    phi_dir: Path, train_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reference: torch's cross entropy over all supervised tokens of all records at once, not a mean of means."""
    module = new_module(phi_dir)
    data = new_data(phi_dir, train_file)
    trainer = new_trainer(tmp_path)
    trainer.validate(module, data)
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("val/"))
    logits, labels = [], []
    module.eval()
    for example in data.splits["val"].examples:
        ids = torch.tensor([example.ids])
        with torch.no_grad():
            logits.append(module.fused_phi(input_ids=ids).logits[0, example.prompt_length - 1 : -1])
        labels.append(ids[0, example.prompt_length :])
    expected = nn.functional.cross_entropy(torch.cat(logits), torch.cat(labels)).item()
    accuracy = (torch.cat(logits).argmax(-1) == torch.cat(labels)).float().mean().item()
    assert float(printed["val/loss"]) == pytest.approx(expected, rel=1e-5)
    assert float(printed["val/perplexity"]) == pytest.approx(math.exp(expected), rel=1e-4)
    assert float(printed["val/token_accuracy"]) == pytest.approx(accuracy, abs=1e-6)


@pytest.mark.parametrize("poisoned", ["loss", "gradient"])
def test_a_value_that_is_not_finite_stops_the_run_before_the_step_and_names_the_records(
    poisoned: str, phi_dir: Path, train_file: Path, tmp_path: Path
) -> None:
    module = new_module(phi_dir)
    data = new_data(phi_dir, train_file, packing=False)
    assert module.phi is not None
    if poisoned == "loss":
        with torch.no_grad():
            module.fused_phi.lm_head.bias[7] = math.nan
    else:
        parameter = next(iter(trainable_parameters(module.phi).values()))
        parameter.register_hook(lambda gradient: gradient * math.inf)
    before = weights_of(module)
    with pytest.raises(NonFiniteError, match=r"step 1: .* not taken\. The records in it: r\d+, r\d+$") as caught:
        new_trainer(tmp_path, accumulate_grad_batches=2, limit_val_batches=0).fit(module, data)
    assert caught.value.exit_code == 1
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(module).items())


def test_the_base_dropout_is_alive_after_a_validation(phi_dir: Path, train_file: Path, tmp_path: Path) -> None:
    """from_pretrained returns eval mode and Lightning keeps the modes it finds."""
    module = new_module(phi_dir, dropout=True)
    new_trainer(tmp_path, max_steps=2, num_sanity_val_steps=-1, val_check_interval=1).fit(
        module, new_data(phi_dir, train_file)
    )
    assert all(layer.training for layer in module.modules() if isinstance(layer, nn.Dropout))


def test_generation_leaves_modes_flags_and_randomness_as_they_were(phi_dir: Path) -> None:
    module = new_module(phi_dir, dropout=True)
    module.fused_phi.model.layers[0].eval()  # a mixture of modes
    modes = {name: layer.training for name, layer in module.named_modules()}
    config = module.fused_phi.config.to_dict(), module.fused_phi.generation_config.to_dict()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    module.generate([[1, 2, 3], [4, 5]])
    assert torch.equal(torch.rand(1), expected)
    assert {name: layer.training for name, layer in module.named_modules()} == modes
    assert (module.fused_phi.config.to_dict(), module.fused_phi.generation_config.to_dict()) == config


def test_answers_hold_neither_prompt_nor_end_token_and_their_length_does_not_count_the_prompt(
    phi_dir: Path,
) -> None:
    """A base whose head always says token 7, then the end token from one position on."""
    module = new_module(phi_dir)
    head = module.fused_phi.lm_head
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
        head.bias[7] = 1.0
    prompts = [[3, 4, 5, 6, 8, 9], [3]]
    answers = module.generate(prompts)
    assert [answer.ids for answer in answers] == [[7] * 8, [7] * 8]  # max_new_tokens is 8, whatever the prompt
    assert [answer.finish_reason for answer in answers] == ["length", "length"]
    with torch.no_grad():
        head.bias[module.eos_token_id] = 2.0
    assert [(answer.ids, answer.finish_reason) for answer in module.generate(prompts)] == [([], "stop")] * 2


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"limit_train_batches": 3, "accumulate_grad_batches": 2}, 2),
        ({"limit_train_batches": 0.5, "accumulate_grad_batches": 3}, 2),
        ({"limit_train_batches": 1.0, "accumulate_grad_batches": 7}, 2),
    ],
)
def test_the_share_of_a_window_follows_the_limits_of_the_trainer(
    settings: dict[str, Any], steps: int, phi_dir: Path, train_file: Path, tmp_path: Path
) -> None:
    """Every window's weights sum to one: its loss is a mean over tokens, so a model that says nothing has ln V."""
    module = new_module(phi_dir)
    with torch.no_grad():
        module.fused_phi.lm_head.weight.zero_()
        module.fused_phi.lm_head.bias.zero_()
    sums: list[float] = []
    step = module.training_step

    def training_step(batch: Any, batch_idx: int) -> torch.Tensor:
        loss = step(batch, batch_idx)
        sums.append(loss.item() / settings["accumulate_grad_batches"])  # what Lightning divides by
        return loss

    module.training_step = training_step  # type: ignore[method-assign]
    trainer = new_trainer(tmp_path, limit_val_batches=0, **settings)
    trainer.fit(module, new_data(phi_dir, train_file, packing=False))
    window = settings["accumulate_grad_batches"]
    windows = [sum(sums[start : start + window]) for start in range(0, len(sums), window)]
    assert trainer.global_step == steps == len(windows)
    vocabulary = module.fused_phi.config.vocab_size
    assert windows == pytest.approx([math.log(vocabulary)] * steps, rel=1e-5)


def test_an_adapter_can_be_started_from(phi_dir: Path, train_file: Path, tmp_path: Path) -> None:
    first = new_module(phi_dir)
    new_trainer(tmp_path, keep=True, max_steps=2).fit(first, new_data(phi_dir, train_file))
    folder = tmp_path / "run" / "version_0"
    for source in (folder / "adapter", folder / "checkpoints" / "last.ckpt"):
        second = LitPhi2(base=str(phi_dir), adapter=str(source), dtype="float32", lora_r=4, lora_alpha=8)
        second.configure_model()
        assert all(torch.equal(weight, weights_of(first)[name]) for name, weight in weights_of(second).items())


@pytest.mark.parametrize("settings", [{"limit_val_batches": 0}, {"check_val_every_n_epoch": 2}])
def test_a_run_that_ends_inside_an_epoch_without_a_validation_keeps_its_last_step(
    settings: dict[str, Any], phi_dir: Path, train_file: Path, tmp_path: Path
) -> None:
    module = new_module(phi_dir)
    data = new_data(phi_dir, train_file, packing=False)
    new_trainer(tmp_path, keep=True, max_steps=15, max_epochs=-1, **settings).fit(module, data)
    folder = tmp_path / "run" / "version_0"
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 15
    exported = read_adapter(folder / "adapter").weights
    assert all(torch.equal(weight, exported[name]) for name, weight in weights_of(module).items())


def test_a_validation_inside_a_window_waits_for_its_end_and_cannot_be_the_best(
    phi_dir: Path, train_file: Path, tmp_path: Path
) -> None:
    """Windows of 4 batches, a validation every 6: the second and the last of twelve fall on a window's end."""
    module = new_module(phi_dir)
    data = new_data(phi_dir, train_file, packing=False)
    saved: list[tuple[int, int]] = []
    trainer = new_trainer(tmp_path, keep=True, max_epochs=2, accumulate_grad_batches=4, val_check_interval=6)
    save = trainer.save_checkpoint
    trainer.save_checkpoint = lambda path, **kwargs: (  # type: ignore[method-assign]
        saved.append((trainer.fit_loop.epoch_loop.batch_progress.current.ready, trainer.global_step)),
        save(path, **kwargs),
    )
    trainer.fit(module, data)
    assert [ready for ready, _ in saved] == [8, 12, 8, 12]
    best = torch.load(tmp_path / "run" / "version_0" / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] in (3, 6)


def test_a_validation_that_is_not_finite_in_part_is_not_finite(phi_dir: Path, train_file: Path, tmp_path: Path) -> None:
    """torchmetrics leaves NaNs out of a mean by default, and a broken model would look like the best."""
    module = new_module(phi_dir)
    loss = module.loss
    poison = iter([math.nan])
    module.loss = lambda batch: (found := loss(batch))._replace(nats=found.nats * next(poison, 1.0))  # type: ignore[method-assign]
    trainer = new_trainer(tmp_path)
    trainer.validate(module, new_data(phi_dir, train_file, packing=False))
    assert math.isnan(trainer.callback_metrics["val/loss"])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"max_steps": 0}, "leave nothing to train"),
        ({"max_epochs": -1}, "one must be set"),
        ({"limit_train_batches": 0.01}, "leave nothing to train"),
    ],
)
def test_limits_that_train_nothing_are_refused_before_a_folder_is_opened(
    settings: dict[str, Any], told: str, phi_dir: Path, train_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=told):
        new_trainer(tmp_path, keep=True, **settings).fit(
            new_module(phi_dir), new_data(phi_dir, train_file, packing=False)
        )
    assert not (tmp_path / "run").exists()
