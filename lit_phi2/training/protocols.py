"""TrainingData: what the model, the callbacks and the Trainer use of the data module.

    LitPhi2       base, max_new_tokens, seed, batching, steps_per_epoch, num_training_batches, fingerprint
    callbacks     splits, tokenizer, prompt_batches, pending, output_kinds
    Trainer       splits, tokenizer, base, max_length, training_records

Lightning types `trainer.datamodule` as Any; `training_data(trainer)` gives it this type, so that mypy checks every use.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import lightning.pytorch as pl
from transformers import PreTrainedTokenizerBase

from lit_phi2.data.loaders import OrderedPrompts
from lit_phi2.data.packing import Array
from lit_phi2.data.records import Record
from lit_phi2.data.schedule import BatchingConfig
from lit_phi2.data.splits import Split
from lit_phi2.pretrained import BaseModel, load_tokenizer

NEUTRAL_TEXT = (
    "Instruct: Explain why the claim was denied and what the member can do.\nOutput: The claim was denied because the "
    "service needs prior authorization, and none was on file on the date of service. The member can ask the provider "
    "for the medical records, and send an appeal within 180 days of this letter."
)


class TrainingData(Protocol):
    """A data module that is set up; ClaimsDataModule is one."""

    base: str
    max_length: int
    max_new_tokens: int
    seed: int
    output_kinds: frozenset[str]  # of identifiers that samples and predictions show as placeholders

    @property
    def splits(self) -> dict[str, Split]:
        """By name: train, val, test or predict."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """None before setup."""

    def batching(self) -> BatchingConfig:
        """How an epoch is cut into rows, micro-batches and optimizer steps."""

    def num_training_batches(self) -> int:
        """Micro-batches of one rank in an epoch."""

    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""

    def fingerprint(self) -> dict[str, Any]:
        """The settings of the data that a resumed run must share, by config key."""

    def prompt_batches(self, split_name: str, count: int | None = None) -> OrderedPrompts:
        """The prompts of the first `count` examples of a split, or of all."""

    def pending(self) -> Array:
        """Indices in predict_files that are not yet completed."""

    def training_records(self) -> list[Record]:
        """The records of train_files, for the nearest-record baseline."""


def training_data(trainer: pl.Trainer) -> TrainingData:
    """The trainer's data module."""
    data: TrainingData = trainer.datamodule
    return data


def tokenizer_of(data: TrainingData) -> PreTrainedTokenizerBase:
    """The tokenizer of a data module that is set up."""
    assert data.tokenizer is not None
    return data.tokenizer


def first_examples(data: TrainingData | None, base: BaseModel) -> Iterator[list[int]]:
    """Token ids of the first records of a data module's first split; of one packaged record where nothing is set up."""
    splits = list(data.splits.values()) if data is not None else []
    if splits and len(splits[0].examples):
        return (example.ids for example in splits[0].examples)
    return iter([load_tokenizer(base)(NEUTRAL_TEXT)["input_ids"]])


def num_pending(trainer: pl.Trainer) -> int:
    """Records of predict_files that this process completes."""
    return len(training_data(trainer).pending()[trainer.global_rank :: trainer.world_size])
