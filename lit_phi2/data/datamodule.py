"""ClaimsDataModule: files in, batches out; it only arranges the other modules of data/.

    setup      sources -> records -> examples -> Split     every invalid record is reported before a model is loaded
    loaders    Split -> schedule -> collate -> Batch       from the current position of the run

The train loader computes its start from the number of optimizer steps when it is iterated, so a resumed run needs no
saved state of a loader.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.core.datamodule import LightningDataModule  # this module is typed for mypy (pyproject.toml)
from transformers import PreTrainedTokenizerBase

from lit_phi2.data.cache import cache_key, is_large, load_or_build_cache
from lit_phi2.data.collate import collate
from lit_phi2.data.encode import iter_examples, token_budget
from lit_phi2.data.loaders import LengthSortedPrompts, ScheduleLoader
from lit_phi2.data.packing import Array
from lit_phi2.data.records import FieldNames, InvalidRecord, Record, iter_records, raise_invalid, read_records
from lit_phi2.data.schedule import (
    BatchingConfig,
    MicroBatch,
    evaluation_schedule,
    num_batches,
    num_rows,
    num_steps,
    training_schedule,
)
from lit_phi2.data.splits import EncodeResult, Split, build_split, explain_empty, hold_out, separate_invalid
from lit_phi2.errors import InputError
from lit_phi2.pretrained import load_tokenizer, read_model_config, resolve_base_model
from lit_phi2.types import Batch, PromptBatch

DEFAULT_VAL_FRACTION = 0.1

_STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}


class ClaimsDataModule(LightningDataModule):
    """Instruction/response records, tokenized for the base and packed.

    Args:
        train_files: a path, a list of paths, claims:SPLIT (packaged; claims:train[:1700] is its first 1,700 records) or
            hub:owner/name[:split]. The ending gives the format: .jsonl, .json, .csv or .parquet.
        val_files: as train_files; null takes val_fraction of the training records.
        test_files: as train_files.
        predict_files: as train_files; the response is optional.
        instruction_field: name of the field with the instruction.
        input_field: name of the field with the input; records may lack it.
        response_field: name of the field with the response.
        id_field: name of the field with the id; a record without one gets <file name>:<line>.
        val_fraction: share of the records used for validation if val_files is null. Records with the same prompt stay
            together.
        max_length: tokens in an example, EOS included, and in a packed row.
        packing: put several examples into a row; they do not attend to each other.
        batch_size: rows in a micro-batch.
        on_overlong: truncate (shortens the input section only), skip or error.
        on_bad_record: error lists every invalid record and stops; skip leaves them out and writes rejected.jsonl.
        cache_dir: where the tokens and texts of files above 64 MiB are stored; null takes the folder cache in
            trainer.default_root_dir. Smaller files are not stored.
        base: linked from model.base.
        max_new_tokens: linked from model.max_new_tokens.
        seed: linked from seed_everything.
    """

    def __init__(
        self,
        train_files: str | list[str] = "claims:train",
        val_files: str | list[str] | None = "claims:validation",
        test_files: str | list[str] = "claims:test",
        predict_files: str | list[str] = "claims:test",
        instruction_field: str = "instruction",
        input_field: str = "input",
        response_field: str = "response",
        id_field: str = "id",
        val_fraction: float = DEFAULT_VAL_FRACTION,
        max_length: int = 512,
        packing: bool = True,
        batch_size: int = 1,
        on_overlong: str = "truncate",
        on_bad_record: str = "error",
        cache_dir: str | None = None,
        base: str = "tiny",
        max_new_tokens: int = 256,
        seed: int = 42,
    ) -> None:
        super().__init__()
        self.files = {"train": train_files, "val": val_files, "test": test_files, "predict": predict_files}
        self.fields = FieldNames(instruction_field, input_field, response_field, id_field)
        self.val_fraction = val_fraction
        self.max_length = max_length
        self.packing = packing
        self.batch_size = batch_size
        self.on_overlong = on_overlong
        self.on_bad_record = on_bad_record
        self.cache_dir = cache_dir
        self.base = base
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.splits: dict[str, Split] = {}
        self.completed: Array = np.zeros(
            0, np.int64
        )  # indices in predict_files that an interrupted predict has completed
        self._check_arguments()

    def setup(self, stage: str) -> None:
        """Read, validate and tokenize the splits of a stage; splits that exist already are not read again.

        Raises:
            InputError: a source cannot be used or, unless on_bad_record is skip, a record is invalid.
        """
        names = _STAGES[stage]
        if "val" in names and self.files["val"] is None:
            names = ("train", "val")  # both are parts of train_files
        names = tuple(name for name in names if name not in self.splits)
        if not names:
            return
        base = resolve_base_model(self.base)
        context = int(read_model_config(base)["max_position_embeddings"])
        budgets = [token_budget(name, self.max_length, self.max_new_tokens, context, self.base) for name in names]
        self.tokenizer = self.tokenizer or load_tokenizer(base)
        splits = {name: self._read_split(name, budget) for name, budget in zip(names, budgets, strict=True)}
        if self.on_bad_record == "error":
            setting = " and ".join(f"data.{name}_files" for name, split in splits.items() if split.invalid)
            raise_invalid([record for split in splits.values() for record in split.invalid], setting=setting)
        for name, split in splits.items():
            if not split.examples:
                held_out = self.files["val"] is None
                raise InputError(explain_empty(name, splits, self.val_fraction, held_out=held_out))
        self.splits |= splits

    def train_dataloader(self) -> "ScheduleLoader[MicroBatch, Batch]":
        # The length is that of a whole epoch, because Lightning itself applies limit_train_batches to it.
        whole = num_batches(self._num_rows(), replace(self.batching(), limit=None))
        return ScheduleLoader(self._rest_of_epoch, self._collate("train"), whole)

    def val_dataloader(self) -> "ScheduleLoader[MicroBatch, Batch]":
        return self._evaluation_loader("val")

    def test_dataloader(self) -> "ScheduleLoader[MicroBatch, Batch]":
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> "ScheduleLoader[int, PromptBatch]":
        batches, pending = self.prompt_batches("predict"), self.pending()
        rank, world_size = self._rank()
        rank_batches = pending[rank::world_size]
        return ScheduleLoader(lambda: rank_batches, batches.__getitem__, len(rank_batches))

    def pending(self) -> list[int]:
        """The batches of prompts that are not yet completed.

        A resumed predict keeps the batches of the first one: in other batches, rounding could change a completion.
        """
        batches = self.prompt_batches("predict")
        completed = np.zeros(len(self.splits["predict"].examples), bool)
        completed[self.completed] = True
        return [batch for batch in range(len(batches)) if not completed[batches.indices(batch)].all()]

    def prompt_batches(self, split_name: str, count: int | None = None) -> LengthSortedPrompts:
        """The prompts of the first `count` examples, or of all."""
        return LengthSortedPrompts(self.splits[split_name], count, self.max_new_tokens)

    def check_context_length(self, split_name: str, count: int | None = None) -> None:
        """Check that the first `count` prompts, each with max_new_tokens, fit into the positions of the base.

        Raises:
            InputError: a prompt is too long; names the first.
        """
        context = int(read_model_config(resolve_base_model(self.base))["max_position_embeddings"])
        split = self.splits[split_name]
        prompt_lengths = (split.lengths - split.supervised)[:count]
        for index in np.flatnonzero(prompt_lengths + self.max_new_tokens > context).tolist():
            example = split.examples[index]
            raise InputError(
                f"model.max_new_tokens: {self.max_new_tokens} after the {example.prompt_length} tokens of prompt "
                f"{example.id!r} in data.{split_name}_files is more than the {context} positions of base "
                f"{self.base!r}. "
                "Lower it, or data.max_length, or measure the loss alone with --max_completions 0."
            )

    def training_records(self) -> list[Record]:
        """The records of train_files as text, for the nearest-record baseline of test.

        Raises:
            InputError: a source cannot be read, or none of its records is valid.
        """
        sources = self._sources("train")
        records, invalid = read_records(sources, self.fields, needs_response=True)
        if not records:
            raise InputError(f"{', '.join(sources)}: none of the records can be used. The first: {invalid[0]}")
        return records

    def batching(self) -> BatchingConfig:
        """How the settings of the Trainer and of this module divide a training epoch."""
        trainer = self.trainer
        assert trainer is not None
        limit = trainer.limit_train_batches
        return BatchingConfig(
            max_length=self.max_length,
            packing=self.packing,
            batch_size=self.batch_size,
            accumulate=trainer.accumulate_grad_batches,
            world_size=trainer.world_size,
            limit=None if isinstance(limit, float) and limit == 1.0 else limit,
        )

    def num_training_batches(self) -> int:
        """Micro-batches of each rank in an epoch."""
        return num_batches(self._num_rows(), self.batching())

    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return num_steps(self.num_training_batches(), self.batching().accumulate)

    def fingerprint(self) -> dict[str, Any]:
        """The values that must be equal for a resumed run to be the same run; a message shows the keys."""
        batching = self.batching()
        return {
            "train_data_digest": self.splits["train"].digest,
            "data.max_length": self.max_length,
            "data.packing": self.packing,
            "data.batch_size": self.batch_size,
            "seed_everything": self.seed,
            # Not world_size: another number of processes with the same rows per step takes the same steps.
            "rows_per_step": self.batch_size * batching.accumulate * batching.world_size,
            "train_batches_all_ranks": (
                batching.limit * batching.world_size if isinstance(batching.limit, int) else batching.limit
            ),
        }

    def _check_arguments(self) -> None:
        if self.on_bad_record not in ("error", "skip"):
            raise InputError(f"data.on_bad_record: {self.on_bad_record!r} is unknown; expected 'error' or 'skip'.")
        if not 0 < self.val_fraction < 1:
            raise InputError(f"data.val_fraction: {self.val_fraction} is not between 0 and 1.")
        if self.val_fraction != DEFAULT_VAL_FRACTION and self.files["val"] is not None:
            raise InputError(
                f"data.val_fraction: {self.val_fraction} has no effect while data.val_files is {self.files['val']!r}. "
                "Set data.val_files to null, or leave val_fraction out."
            )
        for name in ("max_length", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"data.{name}: {getattr(self, name)} is less than 1.")

    def _sources(self, split_name: str) -> list[str]:
        files = self.files[split_name]
        sources = [files] if isinstance(files, str) else list(files or [])
        if not sources or not all(sources):
            raise InputError(f"data.{split_name}_files: is empty; expected a path or a list of paths.")
        return sources

    def _read_split(self, split_name: str, max_length: int) -> Split:
        """Read and encode a split, through the cache if its files are large."""
        held_out = self.files["val"] is None and split_name in ("train", "val")
        sources = self._sources("train" if held_out else split_name)
        with_response = split_name != "predict"
        record_options: dict[str, Any] = {"needs_response": with_response, "with_facts": split_name == "test"}
        limits: dict[str, Any] = {"max_length": max_length, "on_overlong": self.on_overlong}
        tokenizer = self.tokenizer
        assert tokenizer is not None

        def source(invalid: list[InvalidRecord]) -> Iterator[EncodeResult]:
            rows = iter_records(sources, self.fields, **record_options)
            if held_out:
                rows = hold_out(rows, split_name, self.val_fraction)
            records = separate_invalid(rows, invalid)
            return iter_examples(records, tokenizer, **limits, with_response=with_response)

        skip = self.on_overlong == "skip"
        if not is_large(sources):
            return build_split(sources, source, skip=skip)
        part = (split_name, self.val_fraction) if held_out else None
        fields = asdict(self.fields)
        key = cache_key(sources, tokenizer, fields=fields, held_out=part, **record_options, **limits)
        root = Path(self.trainer.default_root_dir if self.trainer else "runs")
        cache_dir = Path(self.cache_dir).expanduser() if self.cache_dir else root / "cache"
        return load_or_build_cache(sources, source, skip=skip, cache_dir=cache_dir, key=key)

    def _num_rows(self) -> int:
        split = self.splits["train"]
        if split.num_rows is None:  # stored, because counting the rows of millions of examples takes seconds
            split.num_rows = num_rows(split.lengths, self.batching())
        return split.num_rows

    def _rank(self) -> tuple[int, int]:
        """The rank of this process and the number of ranks."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _rest_of_epoch(self) -> Iterator[MicroBatch]:
        """The micro-batches after the current optimizer step, to the end of its epoch."""
        assert self.trainer is not None
        split, batching = self.splits["train"], self.batching()
        epoch, step = divmod(self.trainer.global_step, self.steps_per_epoch())
        if self.trainer.overfit_batches > 0:
            epoch = 0  # the same batches in every epoch
        schedule = training_schedule(
            split.lengths, split.supervised, batching, seed=self.seed, epoch=epoch, rank=self.trainer.global_rank
        )
        return (schedule[index] for index in range(step * batching.accumulate, len(schedule)))

    def _evaluation_loader(self, split_name: str) -> "ScheduleLoader[MicroBatch, Batch]":
        rank, world_size = self._rank()
        batching = BatchingConfig(self.max_length, self.packing, self.batch_size, world_size=world_size)
        schedule = evaluation_schedule(self.splits[split_name].lengths, batching, rank=rank)
        return ScheduleLoader(lambda: schedule, self._collate(split_name), len(schedule))

    def _collate(self, split_name: str) -> Callable[[MicroBatch], Batch]:
        examples = self.splits[split_name].examples
        return lambda micro: collate(examples, micro.rows, loss_weight=micro.loss_weight, seed=micro.seed)
