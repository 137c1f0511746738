"""The memory plan against what autograd saves, a cache that is allocated, and cards of a size chosen by hand."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers import new_module
from lit_phi2.cli.main import main
from lit_phi2.data.collate import collate
from lit_phi2.generation.engine import Engine
from lit_phi2.model import linear, phi2
from lit_phi2.model.attention import PackedLayout
from lit_phi2.model.loading import load_phi2
from lit_phi2.model.lora import trainable_parameters
from lit_phi2.model.loss import causal_lm_loss
from lit_phi2.model.phi2 import packed_forward
from lit_phi2.model.quantization import Int8Linear
from lit_phi2.pretrained import BaseModel, read_model_config
from lit_phi2.training.memory_plan import changes_to_fit, plan_fit, plan_predict
from lit_phi2.training.memory_terms import (
    PhiSizes,
    Workload,
    activation_bytes,
    cache_bytes,
    copy_bytes,
    logits_bytes,
    num_lora_parameters,
    weight_bytes,
)
from lit_phi2.training.module import LitPhi2
from lit_phi2.types import Example

PHI2 = PhiSizes(32, 2560, 32, 80, 10240, 51200, 2048, 32, 0.1)
WORK = Workload(
    dtype=torch.bfloat16,
    device_type="cuda",
    lora_r=2,
    targets=("Wqkv", "fc1", "fc2"),
    lora_dropout=0.0,
    activation_checkpointing=False,
    rows=1,
    row_length=512,
    supervised=512,
    longest_example=512,
    prompt_length=300,
    max_new_tokens=256,
    slots=64,
)
GIB = 2**30


def sizes_of(base: BaseModel) -> PhiSizes:
    return PhiSizes.from_config(read_model_config(base))


def test_phi2_has_the_parameters_of_its_model_card() -> None:
    """The reference is the size of microsoft/phi-2 on the hub; LoRA by hand: r (in + out) of three layers."""
    assert PHI2.num_parameters == 2_779_683_840
    assert num_lora_parameters(PHI2, 2, WORK.targets) == 32 * 2 * (4 * 2560 + 5 * 2560 + 5 * 2560)


def test_parameters_are_those_of_the_loaded_model(base: BaseModel) -> None:
    module = new_module(base.folder, target_modules=["Wqkv", "dense", "fc1", "fc2"])
    trained = sum(parameter.numel() for parameter in trainable_parameters(module.phi).values())
    assert sizes_of(base).num_parameters == sum(p.numel() for p in module.phi.parameters()) - trained
    assert num_lora_parameters(sizes_of(base), 4, ("Wqkv", "dense", "fc1", "fc2")) == trained


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("targets", "lora_dropout"), [(("Wqkv", "fc1", "fc2"), 0.0), (("Wqkv", "dense", "fc1", "fc2"), 0.1)]
)
def test_activations_are_the_tensors_that_autograd_saves(
    base: BaseModel, dtype: str, targets: tuple[str, ...], lora_dropout: float, checkpointing: bool
) -> None:
    """Each storage once and no parameter. What is left are indices and statistics of norms: 3 % of so narrow a model.

    With checkpointing autograd has saved the inputs of blocks and of the last norm; the plan also counts one block,
    less its input, for the time when it is computed again.
    """
    settings = {"dtype": dtype, "target_modules": list(targets), "lora_dropout": lora_dropout}
    module = new_module(base.folder, dropout=True, activation_checkpointing=checkpointing, **settings)
    module.phi.train()
    ids, positions = torch.ones(2, 200, dtype=torch.int64), torch.arange(200).repeat(2, 1)
    saved = _bytes_saved(
        lambda: (
            causal_lm_loss(
                packed_forward(module.fused_phi, ids, positions, activation_checkpointing=checkpointing),
                ids,
                module.fused_phi.lm_head,
            ).nats
        ),
        {parameter.untyped_storage()._cdata for parameter in module.phi.parameters()},
    )
    work = replace(
        WORK, dtype=getattr(torch, dtype), device_type="cpu", lora_r=4, targets=targets, lora_dropout=lora_dropout
    )
    work = replace(work, rows=2, row_length=200, supervised=199, activation_checkpointing=checkpointing)
    planned = activation_bytes(sizes_of(base), work)
    if checkpointing:
        once = replace(work, activation_checkpointing=False)
        one_block = activation_bytes(replace(sizes_of(base), num_layers=1), once)
        one_block -= activation_bytes(replace(sizes_of(base), num_layers=0), once)
        planned -= one_block - 2 * 200 * 64 * work.dtype.itemsize
    assert planned == pytest.approx(saved, rel=0.03)


@pytest.mark.parametrize("lora_dropout", [0.0, 0.1])
def test_a_card_saves_what_the_plan_says(base: BaseModel, lora_dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, which takes the ways of a card, with the varlen kernel: each storage once, no parameter.

    Its sums of exponentials, a float32 for each head and token, are not in the plan: 1 % here, less at Phi-2's width.
    Without residual dropout, whose masks have a byte on a card, but two on the meta device.
    """
    monkeypatch.setattr(phi2, "packed_layout", lambda positions, segments: PackedLayout(segments, positions[0].int()))
    module = new_module(base.folder, dropout=True, dtype="bfloat16", lora_dropout=lora_dropout).to("meta")
    for block in module.fused_phi.model.layers:
        block.resid_dropout.p = 0.0
    batch = collate([Example("r", [1] * 192, 0)] * 4, [(0,), (1,), (2,), (3,)]).to("meta")
    parameters = {parameter.untyped_storage()._cdata for parameter in module.phi.parameters()}
    saved = _bytes_saved(lambda: module.loss(batch).nats, parameters)
    work = replace(WORK, lora_r=4, lora_dropout=lora_dropout, rows=4, row_length=192, supervised=191)
    assert activation_bytes(replace(sizes_of(base), dropout=0.0), work) == pytest.approx(saved, rel=0.03)


def test_the_plan_has_the_chunk_of_the_loss() -> None:
    """Reference: 3 chunks of 17,067 tokens, 8,192 positions, 6 bytes a logit; 12 bytes for each number of a state."""
    work = replace(WORK, rows=16, logits_limit=2**30)
    assert logits_bytes(PHI2, work) == 8192 * (17067 * 6 + 2560 * 12)


def _bytes_saved(forward: Callable[[], Tensor], parameters: set[int]) -> int:
    storages: dict[int, int] = {}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            storages[storage._cdata] = storage.nbytes()
            kept.append(tensor)  # so that no later tensor has its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storages.values())


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_the_weights_are_those_of_the_loaded_base(quantization: str | None, base: BaseModel) -> None:
    model = load_phi2(base, torch.bfloat16, quantize=quantization is not None)
    loaded = sum(parameter.nbytes for parameter in model.parameters())
    loaded += sum(layer.weight_scale.nbytes for layer in model.modules() if isinstance(layer, Int8Linear))
    work = replace(WORK, dtype=torch.bfloat16, quantized=quantization is not None)
    assert weight_bytes(sizes_of(base), work) == loaded


def test_the_cache_is_as_large_as_the_engine_allocates_it(base: BaseModel) -> None:
    module = new_module(base.folder)
    engine = Engine(module.fused_phi, eos_token_id=-1, max_new_tokens=5, max_slots=3)
    for key, length in enumerate((7, 70, 30, 9)):
        engine.submit(key, [1] * length)
    engine.step()
    work = replace(WORK, dtype=torch.float32, device_type="cpu", slots=3, prompt_length=70, max_new_tokens=5)
    assert cache_bytes(sizes_of(base), work) == engine._cache.tensor.nbytes


def test_the_copy_for_decoding_is_of_every_matrix_on_a_cpu(base: BaseModel) -> None:
    """The reference is the size of the loaded matrices."""
    module = new_module(base.folder)
    layers = [layer for layer in module.phi.modules() if isinstance(layer, linear.FrozenLinear)]
    work = replace(WORK, dtype=torch.float32, device_type="cpu")
    matrices = sum(layer.weight.nbytes for layer in layers)
    assert copy_bytes(sizes_of(base), work, 100, 2 * matrices) == matrices
    assert copy_bytes(sizes_of(base), work, 99, 2 * matrices) == 0  # too few passes
    assert copy_bytes(sizes_of(base), work, 100, 2 * matrices - 2) == 0  # more than half of what is left


# Verdicts


def test_a_plan_fits_up_to_its_last_byte() -> None:
    needed = plan_fit(PHI2, WORK, 0, GIB).needed
    assert changes_to_fit(PHI2, WORK, 0, needed) == []
    assert changes_to_fit(PHI2, WORK, 0, needed - 1) != []
    assert changes_to_fit(PHI2, WORK, 1, needed) != []  # the program counts


@pytest.mark.parametrize(
    ("changed", "memory", "keys"),
    [
        ({"rows": 8}, 11 * GIB, ["data.batch_size 4"]),
        ({"row_length": 2048}, 10 * GIB, ["model.activation_checkpointing true"]),
        ({"dtype": torch.float32, "activation_checkpointing": True}, 10 * GIB, ["model.dtype bfloat16"]),
        ({"activation_checkpointing": True, "row_length": 2048}, 5.6 * GIB, ["model.quantization int8"]),
        ({"activation_checkpointing": True, "row_length": 2048, "quantized": True}, 3.2 * GIB, ["data.max_length"]),
        ({"rows": 8, "row_length": 2048}, 7 * GIB, ["data.batch_size 1", "model.activation_checkpointing true"]),
        ({}, 4.4 * GIB, ["model.quantization int8"]),
        ({}, 2.6 * GIB, None),
    ],
)
def test_the_key_that_makes_it_fit_is_named(changed: dict[str, object], memory: float, keys: list[str] | None) -> None:
    """Phi-2's weights alone are 5.2 GiB in bfloat16, 10.4 in float32, 2.7 in int8."""
    named = changes_to_fit(PHI2, replace(WORK, **changed), 0, int(memory))
    assert named == keys or [key.split()[0] for key in named or []] == keys


def test_the_named_key_is_enough_and_one_step_less_is_not() -> None:
    work = replace(WORK, rows=8)
    (key,) = changes_to_fit(PHI2, work, 0, 11 * GIB) or []
    rows = int(key.split()[1])
    assert plan_fit(PHI2, replace(work, rows=rows), 0, 11 * GIB).needed <= 11 * GIB
    assert plan_fit(PHI2, replace(work, rows=rows + 1), 0, 11 * GIB).needed > 11 * GIB


def test_predict_has_the_slots_that_half_of_the_rest_holds() -> None:
    """By hand: keys and values of 576 positions are 32 x 2 x 2560 x 576 x 2 bytes."""
    slot = 32 * 2 * 2560 * 576 * 2
    held = plan_predict(PHI2, WORK, 0, 10 * GIB).terms
    base = held["weights"] + held["LoRA, its gradients"]
    assert plan_predict(PHI2, WORK, 0, base + 2 * (5 * slot)).slots == 5
    assert plan_predict(PHI2, WORK, 0, base + 2 * (5 * slot) - 2).slots == 4
    assert plan_predict(PHI2, WORK, 0, 80 * GIB).slots == 64


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_inspect_prints_the_plan(
    dtype: str,
    tmp_path: Path,
    write_jsonl: Callable[..., Path],
    record_rows: list[dict[str, str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of the packaged base: 6.8 M parameters of two bytes; every card has them."""
    path = write_jsonl(record_rows)
    arguments = [f"--data.train_files={path}", "--data.val_files=null", "--data.val_fraction=0.3"]
    arguments += ["--trainer.accelerator=cpu", f"--model.dtype={dtype}"]
    assert main(["inspect", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert next(line.split()[1:3] for line in lines if line.startswith("  weights")) == ["14", "MB"]
    for name in ("this device, cpu", f"8 GB card, {dtype}", f"80 GB card, {dtype}"):
        assert "fit fits; predict fits with " in next(line for line in lines if line.startswith(f"  {name}"))


def test_inspect_prints_what_layers_lose_in_8_bits(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the packaged base, six blocks of four layers and the output layer."""
    assert main(["inspect", "--config", "tiny.yaml", "--what", "quantization", "--trainer.accelerator=cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "error", "outlier", "columns", "weight"]
    errors = {line.split()[0]: float(line.split()[1]) for line in lines[1:]}
    assert len(errors) == 25
    assert all(0.1 < error < 5 for error in errors.values())
    assert main(["inspect", "--config", "tiny.yaml", "--what", "weights"]) == 2
    assert "--what: is 'weights'; expected data or quantization." in capsys.readouterr().err


def test_a_target_that_is_no_layer_is_refused_by_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--config", "tiny.yaml", "--model.target_modules=[q_proj]"]) == 2
    assert "'q_proj' names no linear layer" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()]
)
def test_a_run_out_of_memory_is_referred_to_the_plan(
    error: Exception,
    tmp_path: Path,
    write_jsonl: Callable[..., Path],
    record_rows: list[dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(self: LitPhi2, batch: object) -> None:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LitPhi2, "loss", fail)
    assert main(["validate", f"--data.val_files={write_jsonl(record_rows)}", "--trainer.accelerator=cpu"]) == 1
    printed = capsys.readouterr().err
    assert "out of memory. inspect with the same settings" in printed
    assert "Traceback" not in printed
