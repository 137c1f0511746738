"""TRL's SFTTrainer with its own packing, without activation checkpointing, which it turns on by default."""

from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]  # in an environment of its own

from peers.native_phi import Clock, load_native_phi, training_arguments
from peers.task import IGNORE_INDEX, NUM_CHECKED, LoadedPeer, Task

MAX_LENGTH = 1024  # SFTConfig.max_length by default


def load(task: Task, *, autocast: bool = False) -> LoadedPeer:
    rows = [{"input_ids": example.ids, "labels": example.labels} for example in task.examples]
    trainer = SFTTrainer(
        load_native_phi(task.base, task.dtype),
        SFTConfig(
            **training_arguments(task, 1, task.accumulate(MAX_LENGTH), autocast=autocast),
            max_length=MAX_LENGTH,
            packing=True,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(task.base, local_files_only=True),
        callbacks=[Clock(task.ledger)],
    )
    collate = trainer.data_collator

    def counting_collate(features: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = collate(features)
        records = int((batch["position_ids"] == 0).sum())  # positions restart at every record, and nothing is padded
        supervised_tokens = int((batch["labels"] != IGNORE_INDEX).sum())
        task.ledger.add(records, batch["input_ids"].numel(), supervised_tokens, int(batch["input_ids"].sum()))
        return batch

    trainer.data_collator = counting_collate

    def nats() -> list[float]:
        """Of records packed into one row, as in training: a leak from one to the next would change them."""
        trainer.model.eval()
        with torch.no_grad(), trainer.compute_loss_context_manager():
            batch = trainer._prepare_inputs(collate(rows[:NUM_CHECKED]))  # to its device
            output = trainer.model(**batch, fused_lm_head=True)
        losses, start = [], 0
        for example in task.examples[:NUM_CHECKED]:
            end = start + len(example.ids)
            # log_probs[t] is that of the label at t + 1
            losses.append(-output.log_probs[0, start : end - 1].float().sum().item())
            start = end
        return losses

    return LoadedPeer(trainer.model, nats, trainer.train)
