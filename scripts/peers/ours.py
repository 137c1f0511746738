"""Ours: lit_phi2's module and data under Lightning's Trainer, packed rows."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from lit_phi2.data.collate import collate
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.data.records import Record
from lit_phi2.data.splits import build_split
from lit_phi2.training.module import LitPhi2
from lit_phi2.types import Example
from peers.task import (
    LEARNING_RATE,
    LORA_ALPHA,
    LORA_R,
    NUM_CHECKED,
    SEED,
    WEIGHT_DECAY,
    Ledger,
    LoadedPeer,
    Report,
    Task,
)
from timers import matmul_rates


def load(task: Task, *, reuse: LitPhi2 | None = None, compiled: bool = False, **settings: Any) -> LoadedPeer:
    """Make module, data and Trainer.

    Args:
        task: what to train.
        reuse: the module of an earlier load.
        compiled: whether the elementwise operations of blocks are, on CUDA.
        settings: further arguments of LitPhi2.
    """
    examples = to_examples(task)
    data = _datamodule(task, examples)
    module = _module(task, settings) if reuse is None else reuse.to(task.device)
    module.compiled = compiled
    phi = module.phi
    assert phi is not None
    module.cpu = lambda: module  # Lightning moves it there whenever a run ends
    clock = _Clock(task)

    def nats() -> list[float]:
        phi.eval()
        module.to(task.device)
        batches = [collate(examples, [(index,)]).to(task.device) for index in range(NUM_CHECKED)]
        with torch.no_grad():
            losses = [module.loss(batch).nats.item() for batch in batches]
        phi.train()
        return losses

    def metrics() -> Report:
        return matmul_utilization(module, task.ledger, clock.max_tokens, clock.max_supervised_tokens)

    return LoadedPeer(module, nats, lambda: _trainer(task, clock).fit(module, datamodule=data), metrics, module)


def to_examples(task: Task) -> list[Example]:
    """The examples of a task as lit_phi2 has them."""
    return [
        Example(f"record {index}", example.ids, example.prompt_length) for index, example in enumerate(task.examples)
    ]


def matmul_utilization(module: LitPhi2, ledger: Ledger, max_tokens: int, max_supervised_tokens: int) -> Report:
    """The fraction of the device's matmul rate at which a step runs; 1 if a step consisted of frozen matmuls only.

    Args:
        module: after training.
        ledger: of the training.
        max_tokens, max_supervised_tokens: of a micro-batch; they decide the shapes of the matmuls that are measured.
    """
    rates = step_matmul_rates(module, max_tokens, max_supervised_tokens)
    best = max(rates, key=lambda name: rates[name])
    flops_per_second = step_flops(module, ledger.tokens, ledger.supervised_tokens) / ledger.seconds
    return {
        "matmul_utilization": flops_per_second / rates[best],
        "best_matmul_rate": rates[best],
        "best_matmul": best,
        "matmul_rates": rates,
    }


def step_flops(module: LitPhi2, tokens: int, supervised_tokens: int) -> int:
    """FLOPs of the frozen matmuls: forward, and backward to the input, each 2 per weight and token."""
    weights = sum(layer.weight.numel() for layers in _frozen_layers(module).values() for layer in layers)
    return 4 * weights * tokens + 4 * module.fused_phi.lm_head.weight.numel() * supervised_tokens


def step_matmul_rates(
    module: LitPhi2, tokens: int, supervised_tokens: int, *, seconds: float = 0.5
) -> dict[str, float]:
    """FLOP/s of the device in the matmul shapes of a micro-batch."""
    rates: dict[str, float] = {}
    for name, layers in _frozen_layers(module).items():
        rates |= matmul_rates(name, tokens, layers[0].weight, seconds=seconds)
    return rates | matmul_rates("head", supervised_tokens, module.fused_phi.lm_head.weight, seconds=seconds)


def _frozen_layers(module: LitPhi2) -> dict[str, list[nn.Linear]]:
    """The linear layers of the blocks, by the last part of their name."""
    frozen: dict[str, list[nn.Linear]] = {}
    for name, layer in module.fused_phi.model.layers.named_modules():
        if isinstance(layer, nn.Linear) and "lora_" not in name:
            frozen.setdefault(name.removesuffix(".base_layer").rpartition(".")[2], []).append(layer)
    return frozen


def _datamodule(task: Task, examples: list[Example]) -> ClaimsDataModule:
    """A datamodule whose splits are filled in, so that setup has nothing to read."""
    records = [Record(example.id, "", "", "", "") for example in examples]
    data = ClaimsDataModule(max_length=task.row_length, batch_size=task.rows, base=task.base, seed=SEED)
    split = build_split([], lambda *_: zip(records, examples, strict=True), skip=False)
    data.splits = {"train": split, "val": split}
    return data


def _module(task: Task, settings: dict[str, Any]) -> LitPhi2:
    module = LitPhi2(
        base=task.base,
        lora_r=LORA_R,
        lora_alpha=LORA_ALPHA,
        lora_dropout=0.0,
        target_modules=["Wqkv", "fc1", "fc2"],
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        warmup_ratio=0.0,
        dtype=task.dtype,
        seed=SEED,
        **({"quantization": task.quantization} | settings),
    )
    module.configure_model()
    return module.to(task.device)


def _trainer(task: Task, clock: "_Clock") -> pl.Trainer:
    return pl.Trainer(
        accelerator=task.device,
        devices=1,
        max_epochs=1,
        accumulate_grad_batches=task.accumulate(task.row_length * task.rows),
        gradient_clip_val=1.0,  # the default of lit_phi2 and of Hugging Face's Trainer
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[clock],
    )


class _Clock(pl.Callback):
    def __init__(self, task: Task) -> None:
        self.ledger = task.ledger
        self.examples = task.examples
        self.max_tokens = self.max_supervised_tokens = 0

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.ledger.begin()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step > self.ledger.steps:
            self.ledger.end_step()
        checksum = sum(sum(self.examples[int(name.split()[1])].ids) for name in batch.record_ids)
        self.ledger.add(len(batch.record_ids), batch.num_tokens, batch.supervised_tokens, checksum)
        self.max_tokens = max(self.max_tokens, batch.num_tokens)
        self.max_supervised_tokens = max(self.max_supervised_tokens, batch.supervised_tokens)
