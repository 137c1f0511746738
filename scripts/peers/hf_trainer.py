"""HF Trainer on transformers' own Phi with PEFT's own LoRA; every micro-batch is padded."""

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from peers.native_phi import Clock, load_native_phi, training_arguments
from peers.task import IGNORE_INDEX, NUM_CHECKED, Example, LoadedPeer, Task


def load(
    task: Task,
    *,
    batch_size: int,
    width: int | None = None,
    dtype: str | None = None,
    autocast: bool = False,
    reuse: Any = None,
) -> LoadedPeer:
    """Load the model and make the Trainer.

    Args:
        task: what to train.
        batch_size: records in a micro-batch.
        width: tokens that every record is padded to; None for the longest of its batch.
        dtype: of the base; None for the task's.
        autocast: TrainingArguments' bf16, on top of a bfloat16 base.
        reuse: the model of an earlier load.
    """
    model = load_native_phi(task.base, dtype or task.dtype) if reuse is None else reuse

    def collate(examples: list[Example]) -> dict[str, Tensor]:
        batch = padded(examples, width or max(len(example.ids) for example in examples))
        supervised_tokens = int((batch["labels"] != IGNORE_INDEX).sum())
        tokens, checksum = int(batch["attention_mask"].sum()), int(batch["input_ids"].sum())
        task.ledger.add(len(examples), tokens, supervised_tokens, checksum)
        return batch

    arguments = training_arguments(task, batch_size, task.records_per_step // batch_size, autocast=autocast)
    trainer = Trainer(
        model,
        TrainingArguments(**arguments, remove_unused_columns=False),
        data_collator=collate,
        train_dataset=task.examples,  # a list is a map-style dataset
        callbacks=[Clock(task.ledger)],
    )

    def nats() -> list[float]:
        model.eval()
        losses = []
        with torch.no_grad(), trainer.compute_loss_context_manager():
            for example in task.examples[:NUM_CHECKED]:
                ids, labels = (torch.tensor([row], device=model.device) for row in (example.ids, example.labels))
                mean = model(input_ids=ids, labels=labels, use_cache=False).loss
                losses.append(mean.item() * example.supervised_tokens)
        return losses

    return LoadedPeer(model, nats, trainer.train, reusable=model)


def padded(examples: list[Example], width: int) -> dict[str, Tensor]:
    """Each example a row of `width` tokens; ids and mask are 0 at padding."""
    size = (len(examples), width)
    input_ids, attention_mask = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)
    labels = torch.full(size, IGNORE_INDEX, dtype=torch.int64)
    for row, example in enumerate(examples):
        end = len(example.ids)
        input_ids[row, :end] = torch.tensor(example.ids)
        labels[row, :end] = torch.tensor(example.labels)
        attention_mask[row, :end] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
