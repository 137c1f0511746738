"""TrainingData: what the model, the callbacks and the Trainer use of the data module.

    LitPhi2       base, max_new_tokens, seed, batching, steps_per_epoch, num_training_batches, fingerprint
    callbacks     splits, tokenizer, prompt_batches, output_kinds
    Trainer       splits, tokenizer, training_records

Lightning types `trainer.datamodule` as Any; `training_data(trainer)` gives it this type, so that mypy checks every use.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import lightning.pytorch as pl
from transformers import PreTrainedTokenizerBase

from lit_phi2.data.records import Record
from lit_phi2.data.schedule import BatchingConfig
from lit_phi2.data.splits import Split
from lit_phi2.types import PromptBatch


class TrainingData(Protocol):
    """A data module that is set up; ClaimsDataModule is one."""

    base: str
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

    def prompt_batches(self, split_name: str, count: int | None = None) -> Sequence[PromptBatch]:
        """The prompts of the first `count` examples of a split, or of all."""

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
