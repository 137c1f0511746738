"""float16: trains and answers as float32 does, skips steps that overflow, and names what does not fit its range."""

import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import PhiForCausalLM

from helpers import DieAt, Gradients, new_data, new_module, new_trainer, relative_difference, weights_of
from lit_phi2.cli.main import main
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.errors import NonFiniteError
from lit_phi2.training import loss_scale
from lit_phi2.training.module import LitPhi2
from lit_phi2.training.training_module import TrainingModule

Jsonl = Callable[..., Path]


def changed_base(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a base with other weights."""
    shutil.copytree(source, target)
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.fixture(scope="module")
def planted(claims_phi_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose attention scores are beyond float16: weights of queries and keys are 200 times as large."""

    def enlarge(weights: dict[str, torch.Tensor]) -> None:
        for name, weight in weights.items():
            if ".q_proj." in name or ".k_proj." in name:
                weight.mul_(200)

    return changed_base(claims_phi_dir, tmp_path_factory.mktemp("planted") / "phi", enlarge)


def largest_score(module: LitPhi2, prompt: list[int]) -> float:
    """The largest score before it is scaled, in float32."""
    largest = 0.0

    def look(layer: Any, inputs: Any, output: torch.Tensor) -> None:
        nonlocal largest
        query, key, _ = output.float().view(len(prompt), 3, 4, 16).unbind(1)
        largest = max(largest, torch.einsum("qhd,khd->hqk", query, key).abs().max().item())

    handles = [block.self_attn.Wqkv.register_forward_hook(look) for block in module.fused_phi.model.layers]
    module.fused_phi(input_ids=torch.tensor([prompt]))
    for handle in handles:
        handle.remove()
    return largest


def test_scores_beyond_its_range_train_as_in_float32(planted: Path, train_file: Path, tmp_path: Path) -> None:
    """Reference: the same steps in float32. float16 has 11 bits; a gradient passes some twenty roundings to them."""
    losses, steps = {}, {}
    for dtype in ("float32", "float16"):
        module, data = new_module(planted, dtype=dtype), new_data(planted, train_file)
        callback = Gradients()
        trainer = new_trainer(tmp_path / dtype, [callback], max_steps=6, max_epochs=6)
        trainer.fit(module, data)
        losses[dtype], steps[dtype] = trainer.callback_metrics["val/loss"].item(), callback.steps
    examples = data.splits["train"].examples
    assert largest_score(new_module(planted), examples[0].ids) > 65504
    assert losses["float16"] == pytest.approx(losses["float32"], abs=2e-3)
    for name, expected in steps["float32"][0].items():
        assert expected.dtype == steps["float16"][0][name].dtype == torch.float32
        assert relative_difference(steps["float16"][0][name], expected) < 1e-2, name


def test_scores_beyond_its_range_answer_as_in_float32(planted: Path, train_file: Path) -> None:
    """Reference: transformers' generate in float32. One of eight may differ: two tokens of almost the same logit."""
    module, data = LitPhi2(base=str(planted), dtype="float16", max_new_tokens=8), new_data(planted, train_file)
    module.configure_model()
    data.setup("fit")
    examples = [data.splits["train"].examples[index] for index in range(8)]
    prompts = [example.ids[: example.prompt_length] for example in examples]
    reference = PhiForCausalLM.from_pretrained(planted, dtype=torch.float32).eval()
    matches = 0
    for prompt, completion in zip(prompts, module.generate(prompts), strict=True):
        ids = reference.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=0)
        matches += ids[0, len(prompt) :].tolist()[: len(completion.ids)] == completion.ids
        assert len(completion.ids) == 8
    assert matches >= 7


class ScaleAtStart(Callback):
    """Begins with a loss scale under which the first steps overflow, and keeps weights and scale after every step."""

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.weights: list[dict[str, torch.Tensor]] = []
        self.scales: list[float] = []
        self.learning_rates: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: LitPhi2) -> None:
        if trainer.global_step == 0:
            pl_module.loss_scale.scale = self.scale
        self.weights.append(weights_of(pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: LitPhi2, *_: Any) -> None:
        self.weights.append(weights_of(pl_module))
        self.scales.append(pl_module.loss_scale.scale)
        self.learning_rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def fit_with_scale(base: Path, train: Path, folder: Path, scale: float, **settings: Any) -> tuple[LitPhi2, Any, Any]:
    module, callback = new_module(base, dtype="float16", warmup_ratio=0.2), ScaleAtStart(scale)
    trainer = new_trainer(folder, [callback], keep=True, **settings)
    trainer.fit(module, new_data(base, train))
    return module, callback, trainer


def test_a_step_that_overflows_changes_nothing_and_is_logged(
    phi_dir: Path, train_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, read_events: Any
) -> None:
    """References: weights before and after each step; AdamW's own counter; the schedule of the same run in float32."""
    caplog.set_level(logging.INFO, "lit_phi2")
    scale = 2.0**24
    module, callback, trainer = fit_with_scale(phi_dir, train_file, tmp_path, scale, max_epochs=4)
    assert module.loss_scale is not None
    skipped, num_steps = module.loss_scale.skipped_steps, trainer.global_step
    assert 0 < len(skipped) < num_steps
    for step in range(1, num_steps + 1):
        before, after = callback.weights[step - 1 : step + 1]
        changed = any(not torch.equal(after[name], weight) for name, weight in before.items())
        assert changed == (step not in skipped)
        num_skipped = sum(other <= step for other in skipped)
        assert callback.scales[step - 1] == scale / 2**num_skipped
    states = trainer.optimizers[0].state.values()
    assert {int(state["step"]) for state in states} == {num_steps - len(skipped)}
    assert {state["exp_avg"].dtype for state in states} == {torch.float32}
    lines = [record.getMessage() for record in caplog.records if "is skipped: float16" in record.getMessage()]
    assert [int(line.split()[1]) for line in lines] == skipped

    run_dir = tmp_path / "run" / "version_0"
    uses = [use["step"] for row in pq.read_table(run_dir / "ledger.parquet").to_pylist() for use in row["uses"]]
    assert set(uses) == set(range(1, num_steps + 1)) - set(skipped)
    events: EventAccumulator = read_events(run_dir)
    assert [event.value for event in events.Scalars("train/loss_scale")] == callback.scales
    assert events.Scalars("train/skipped_steps")[-1].value == len(skipped)
    logged = {event.step: event.value for event in events.Scalars("train/grad_norm")}
    assert sorted(logged) == [step for step in range(1, num_steps + 1) if step not in skipped]
    assert all(event.value < 100 for event in events.Scalars("train/grad_norm")), "without the scale"

    rates: list[float] = []

    class Rates(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    new_trainer(tmp_path / "float32", [Rates()], max_epochs=4).fit(
        new_module(phi_dir, warmup_ratio=0.2), new_data(phi_dir, train_file)
    )
    assert callback.learning_rates == rates


def test_the_first_gradients_are_those_of_float32(phi_dir: Path, train_file: Path, tmp_path: Path) -> None:
    """Over an accumulation window whose records have different lengths; without the loss scale, before clipping."""
    steps = {}
    for dtype in ("float32", "float16"):
        callback = Gradients()
        trainer = new_trainer(tmp_path, [callback], max_steps=1, accumulate_grad_batches=3, limit_val_batches=0)
        trainer.fit(new_module(phi_dir, dtype=dtype), new_data(phi_dir, train_file, packing=False))
        (steps[dtype],) = callback.steps
    for name, expected in steps["float32"].items():
        assert relative_difference(steps["float16"][name], expected) < 1e-2, name


def test_a_resumed_float16_run_is_the_whole_one_bit_for_bit(
    phi_dir: Path, train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit. The scale falls at the first steps and doubles after every second good one."""
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 2)
    settings = {"max_epochs": 3, "accumulate_grad_batches": 4, "limit_val_batches": 0}
    step = 5  # of nine

    def fit(folder: Path, *callbacks: Callback, ckpt_path: str | None = None) -> LitPhi2:
        module = new_module(phi_dir, dtype="float16", dropout=True, lora_dropout=0.2)
        trainer = new_trainer(folder, [ScaleAtStart(2.0**22), *callbacks], keep=True, **settings)
        trainer.checkpoint_every_n_steps = 1
        trainer.fit(module, new_data(phi_dir, train_file, packing=False), ckpt_path=ckpt_path)
        return module

    whole = fit(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path / "cut", DieAt(step))
    last = tmp_path / "cut" / "run" / "version_0" / "checkpoints" / "last.ckpt"
    state = torch.load(last, weights_only=True)
    assert state["global_step"] == step
    assert state["lit_phi2"]["loss_scale"]["scale"] != loss_scale.INITIAL_SCALE
    resumed = fit(tmp_path / "cut", ckpt_path=str(last))
    assert resumed.loss_scale == whole.loss_scale
    assert whole.loss_scale is not None
    assert whole.loss_scale.skipped_steps
    for name, weight in weights_of(whole).items():
        assert torch.equal(weights_of(resumed)[name], weight), name


# What does not fit


@pytest.fixture
def overflowing_file(write_jsonl: Jsonl, record_rows: list[dict[str, str]]) -> Path:
    """Twelve records; only the prompt of the seventh has a Q."""
    record_rows[6]["instruction"] += " Q"
    return write_jsonl(list(record_rows))


def residual_base(source: Path, target: Path, tokenizer: Any, layer: int) -> Path:
    """A base whose residual sum overflows after a layer, only at a Q: 45,000 of its embedding and 30,000 of a bias."""
    (token,) = tokenizer("Q", add_special_tokens=False)["input_ids"]

    def enlarge(weights: dict[str, torch.Tensor]) -> None:
        weights["model.embed_tokens.weight"][token, 3] = 45_000
        weights[f"model.layers.{layer}.mlp.fc2.bias"][3] = 30_000

    return changed_base(source, target / f"residual{layer}", enlarge)


@pytest.mark.parametrize(("layer", "loss"), [(0, "nan"), (1, r"\d+\.\d+")])
def test_a_residual_that_overflows_is_named_with_its_record(
    layer: int, loss: str, overflowing_file: Path, claims_phi_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """In float32 the same step is taken. The message has the record's line and no word of it.

    After the last layer no other token sees the Q, which is not scored: only the gradient is not finite, 0 x NaN.
    """
    base = residual_base(claims_phi_dir, tmp_path, tokenizer, layer)
    settings = {"max_steps": 1, "accumulate_grad_batches": 12, "limit_val_batches": 0}
    new_trainer(tmp_path, **settings).fit(new_module(base), new_data(base, overflowing_file, packing=False))
    module = new_module(base, dtype="float16")
    before = weights_of(module)
    with pytest.raises(NonFiniteError, match=f"step 1: the loss is {loss} and the gradient norm nan") as error:
        new_trainer(tmp_path, **settings).fit(module, new_data(base, overflowing_file))
    message = str(error.value)
    assert f"float16 overflows: the residual sum after model.layers.{layer} is beyond 65,504" in message
    assert f"first for {overflowing_file}:7. Set model.dtype to float32" in message
    assert "claim" not in message
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(module).items())


def test_a_validation_that_overflows_names_its_record(
    overflowing_file: Path, claims_phi_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    base = residual_base(claims_phi_dir, tmp_path, tokenizer, 0)
    with pytest.raises(NonFiniteError, match=rf"after model.layers.0 .* first for {overflowing_file}:7\."):
        new_trainer(tmp_path).validate(new_module(base, dtype="float16"), new_data(base, overflowing_file))


def test_a_prompt_whose_logits_overflow_is_named(
    overflowing_file: Path, claims_phi_dir: Path, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its completion would be `!!!!`: the largest of logits that are NaN is the first, token 0."""
    base = residual_base(claims_phi_dir, tmp_path, tokenizer, 0)
    arguments = ["predict", f"--model.base={base}", f"--data.predict_files={overflowing_file}"]
    arguments += ["--data.max_length=128", "--model.max_new_tokens=4", "--trainer.accelerator=cpu"]
    arguments += [f"--trainer.default_root_dir={tmp_path}", f"--output={tmp_path / 'out.jsonl'}"]
    assert main([*arguments, "--model.dtype=float16"]) == 1
    assert f"{overflowing_file}:7: the logits after 0 tokens of its completion are" in capsys.readouterr().err
    assert main([*arguments, "--model.dtype=float32"]) == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 12


def test_gradients_that_never_fit_end_the_run(phi_dir: Path, train_file: Path, tmp_path: Path) -> None:
    """From 2^16 the scale falls to 1 in sixteen steps; the seventeenth has no scale left to halve."""

    class Infinite(Callback):
        def on_after_backward(self, trainer: Any, pl_module: TrainingModule) -> None:
            next(p.grad for p in pl_module.parameters() if p.grad is not None).fill_(math.inf)

    module = new_module(phi_dir, dtype="float16")
    data: ClaimsDataModule = new_data(phi_dir, train_file)
    with pytest.raises(NonFiniteError, match=r"step 17: .* gradient norm inf; the step was not taken\. The records"):
        new_trainer(tmp_path, [Infinite()], max_epochs=30, limit_val_batches=0).fit(module, data)
    assert module.loss_scale is not None
    assert module.loss_scale.skipped_steps == list(range(1, 17))


@pytest.mark.slow
def test_the_packaged_base_learns_in_float16_what_it_learns_in_float32(tmp_path: Path) -> None:
    """Five steps of tiny.yaml; the whole fit ends within 0.003 too (training/README.md)."""
    losses = {}
    files = {"train_files": "claims:train[:16]", "val_files": "claims:validation[:3]"}
    for dtype in ("float32", "float16"):
        module = LitPhi2(dtype=dtype, lora_r=16, lora_alpha=32, learning_rate=2e-3, max_new_tokens=4)
        data = ClaimsDataModule(**files, base="tiny", max_length=1024, max_new_tokens=4)
        trainer = new_trainer(tmp_path, max_steps=5, max_epochs=2)
        trainer.fit(module, data)
        losses[dtype] = trainer.callback_metrics["val/loss"].item()
    assert losses["float16"] == pytest.approx(losses["float32"], abs=3e-3)
    new_trainer(tmp_path).validate(module := LitPhi2(dtype="float32", max_new_tokens=4), data)
    assert module.trainer.callback_metrics["val/loss"].item() > losses["float32"] + 0.01, "it learned"
