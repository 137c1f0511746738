"""ClaimsDataModule: files in, batches out; it only arranges the other modules of data/.

    setup      sources -> files -> records -> examples -> Split    every fault is reported before a model is loaded
    loaders    Split -> schedule -> collate -> Batch               from the current position of the run

The train loader computes its start from the number of optimizer steps when it is iterated, so a resumed run needs no
saved state of a loader.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.core.datamodule import LightningDataModule  # this module is typed for mypy (pyproject.toml)
from transformers import PreTrainedTokenizerBase

from lit_phi2.audit.redaction import check_kinds
from lit_phi2.data import arguments
from lit_phi2.data.canaries import describe_planted, make_canaries
from lit_phi2.data.collate import collate
from lit_phi2.data.encode import token_budget
from lit_phi2.data.load_split import load_split, read_training_records
from lit_phi2.data.loaders import OrderedPrompts, ScheduleLoader, order_prompts
from lit_phi2.data.overlap import drop_repeated, overlap_warnings, training_prompt_warnings
from lit_phi2.data.packing import Array
from lit_phi2.data.record_stream import StreamItem, stream_examples
from lit_phi2.data.records import FieldNames, ReadOptions, Record
from lit_phi2.data.schedule import (
    BatchingConfig,
    MicroBatch,
    evaluation_schedule,
    num_batches,
    num_rows,
    num_steps,
    training_schedule,
)
from lit_phi2.data.sources import expand_sources
from lit_phi2.data.split_checks import check_prompts_fit, check_splits, truncation_warnings
from lit_phi2.data.splits import Split
from lit_phi2.data.without import check_found, read_without
from lit_phi2.pretrained import load_tokenizer, read_model_config, resolve_base_model
from lit_phi2.types import Batch, PromptBatch
from lit_phi2.utils.constructors import keep_arguments
from lit_phi2.utils.paths import expand_user

log = logging.getLogger(__name__)

_STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}


class ClaimsDataModule(LightningDataModule):
    """Instruction/response records, tokenized for the base and packed.

    Args:
        train_files: a file, a folder, a pattern, or a list; a pattern is such as data/*.jsonl. Also claims:SPLIT
            (packaged; claims:train[:1700] is its first 1,700 records) and hub:owner/name[:split]. The ending gives
            the format: .jsonl, .json, .csv, .tsv or .parquet, each also with .gz or .zst.
        val_files: null takes val_fraction of train_files; otherwise as train_files.
        test_files: as train_files.
        predict_files: as train_files, or - for standard input; the response is optional, and - is JSON Lines.
        instruction_field: field with the instruction; null: as the form of the file has it.
        input_field: field with the input; records may lack it.
        response_field: field with the response.
        id_field: field with the id; a record without one gets <file name>:<line>.
        turns: error, first or last; which exchange of a conversation is the record, error refuses several.
        encoding: of text files, such as cp1252; null takes UTF-8, or UTF-16 by its byte order mark.
        val_fraction: share to hold out if val_files is null; records with the same prompt stay together.
        max_length: tokens in an example, and in a packed row; EOS included.
        packing: put several examples into a row; they do not attend to each other.
        batch_size: rows in a micro-batch, or auto; as many as fit, of the rows in accumulate_grad_batches.
        without: a file with one id a line; training and validation leave these records out.
        canaries: made-up records to plant, of each kind; in prompt or response, 1, 4 or 16 times, for audit.
        on_overlong: truncate, skip or error; truncate shortens the input section only.
        on_bad_record: error or skip; error lists every invalid record and stops, skip leaves them out and writes
            rejected.jsonl.
        cache_dir: folder for the tokens of large files; those above 64 MiB are stored, with their texts. null takes the
            folder cache in trainer.default_root_dir.
        redact: kinds of identifiers to replace; all, or a list such as [ssn, npi]; placeholders take their places
            before anything else is done.
        redact_output: the same for samples and predictions alone.
        base: linked from model.base.
        max_new_tokens: linked from model.max_new_tokens.
        seed: linked from seed_everything.
    """

    @keep_arguments
    def __init__(
        self,
        train_files: str | list[str] = "claims:train",
        val_files: str | list[str] | None = "claims:validation",
        test_files: str | list[str] = "claims:test",
        predict_files: str | list[str] = "claims:test",
        instruction_field: str | None = None,
        input_field: str | None = None,
        response_field: str | None = None,
        id_field: str | None = None,
        turns: str = "error",
        encoding: str | None = None,
        val_fraction: float = arguments.DEFAULT_VAL_FRACTION,
        max_length: int = 512,
        packing: bool = True,
        batch_size: int | str = 1,
        without: str | None = None,
        canaries: int = 0,
        on_overlong: str = "truncate",
        on_bad_record: str = "error",
        cache_dir: str | None = None,
        redact: str | list[str] | None = None,
        redact_output: str | list[str] | None = None,
        base: str = "tiny",
        max_new_tokens: int = 256,
        seed: int = 42,
    ) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # predict with fewer batches than processes
        arguments.check_reading(turns, encoding, on_overlong, on_bad_record)
        arguments.check_val_fraction(val_fraction, val_files)
        arguments.check_minimum(1, max_length=max_length)
        arguments.check_minimum(0, canaries=canaries)
        self.files = {"train": train_files, "val": val_files, "test": test_files, "predict": predict_files}
        fields = FieldNames(instruction_field, input_field, response_field, id_field)
        self.read_options = ReadOptions(fields, turns, encoding, redact=check_kinds(redact, "data.redact"))
        self.output_kinds = frozenset(self.read_options.redact + check_kinds(redact_output, "data.redact_output"))
        self.val_fraction = val_fraction
        self.max_length, self.packing, self.batch_size = max_length, packing, arguments.rows(batch_size)
        self.without, self.canaries = without, canaries
        self.on_overlong, self.on_bad_record = on_overlong, on_bad_record
        self.cache_dir = cache_dir
        self.base, self.max_new_tokens, self.seed = base, max_new_tokens, seed
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.splits: dict[str, Split] = {}
        # Indices in predict_files that an interrupted predict has completed.
        self.completed: Array = np.zeros(0, np.int64)

    def setup(self, stage: str) -> None:
        """Read, validate and tokenize the splits of a stage, and log the warnings of `read`."""
        for warning in self.read(stage):
            log.warning(warning)

    def read(self, stage: str) -> list[str]:
        """What setup does; splits that exist already are not read again.

        Returns:
            Warnings: files given twice, inputs that were shortened, and what the splits share.

        Raises:
            InputError: a source cannot be used or, unless on_bad_record is skip, a record is invalid.
        """
        names, held_out = _STAGES[stage], None
        if "val" in names and self.files["val"] is None:
            names, held_out = ("train", "val"), self.val_fraction  # both are parts of train_files
        names = tuple(name for name in names if name not in self.splits)
        if not names:
            return []
        base, context = resolve_base_model(self.base), self._context()
        budgets = [token_budget(name, self.max_length, self.max_new_tokens, context, self.base) for name in names]
        self.tokenizer = self.tokenizer or load_tokenizer(base)
        load = partial(load_split, tokenizer=self.tokenizer, on_overlong=self.on_overlong, held_out=held_out)
        splits: dict[str, Split] = {}
        warnings: list[str] = []
        for name, budget in zip(names, budgets, strict=True):
            sources, repeated = self._sources(name)
            options, canaries = (
                self._options(name),
                make_canaries(self.canaries if name == "train" else 0, self.seed)[0],
            )
            folder = self.cache_folder()
            splits[name] = load(name, sources, options, max_length=budget, cache_dir=folder, canaries=canaries)
            warnings += [warning for warning in repeated if warning not in warnings]
        check_splits(splits, allow_invalid=self.on_bad_record == "skip", held_out=held_out)
        self.splits |= splits
        if self.without and stage == "fit":
            check_found(self.without, read_without(self.without), (self.splits["train"], self.splits["val"]))
        if self.canaries and stage == "fit":
            log.info("%s", describe_planted(self.splits["train"].records))
        warnings += truncation_warnings(splits)
        return warnings + overlap_warnings(self.splits, new=names, held_out=held_out is not None)

    def train_dataloader(self) -> "ScheduleLoader[MicroBatch, Batch]":
        # The length is that of a whole epoch, because Lightning itself applies limit_train_batches to it.
        whole = num_batches(self._num_rows(), replace(self.batching(), limit=None))
        return ScheduleLoader(self._rest_of_epoch, self._collate("train"), whole)

    def val_dataloader(self) -> "ScheduleLoader[MicroBatch, Batch]":
        return self._evaluation_loader("val")

    def test_dataloader(self) -> "ScheduleLoader[MicroBatch, Batch]":
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> "ScheduleLoader[int, PromptBatch]":
        batches = order_prompts(self.splits["predict"], self.pending()).share(*self._rank())
        return ScheduleLoader(lambda: range(len(batches)), batches.__getitem__, len(batches))

    def pending(self) -> Array:
        """Indices in predict_files that are not yet completed."""
        return np.setdiff1d(np.arange(len(self.splits["predict"].examples)), self.completed)

    def prompt_batches(self, split_name: str, count: int | None = None) -> OrderedPrompts:
        """The prompts of the first `count` examples, or of all."""
        split = self.splits[split_name]
        return order_prompts(split, np.arange(len(split.examples))[:count])

    def stream_predict_files(self) -> Iterator[StreamItem]:
        """The records of predict_files with their prompts, each as soon as it is read; nothing is stored."""
        budget = token_budget("predict", self.max_length, self.max_new_tokens, self._context(), self.base)
        self.tokenizer = self.tokenizer or load_tokenizer(resolve_base_model(self.base))
        sources, options = self._sources("predict")[0], self.read_options
        return stream_examples(sources, options, self.tokenizer, max_length=budget, on_overlong=self.on_overlong)

    def check_context_length(self, split_name: str, count: int | None = None) -> None:
        """Check that the first `count` prompts, each with max_new_tokens, fit into the positions of the base.

        Raises:
            InputError: a prompt is too long; names the first.
        """
        split, context = self.splits[split_name], self._context()
        check_prompts_fit(split, count, split_name, self.max_new_tokens, context, self.base)

    def training_records(self) -> list[Record]:
        """The records of train_files as text, for the nearest-record baseline of test.

        Logs a warning if records of test have the same prompts.

        Raises:
            InputError: a source cannot be read, or none of its records is valid.
        """
        records = read_training_records(self._sources("train")[0], self._options("train"))
        if "test" in self.splits and "train" not in self.splits:  # otherwise they were compared in setup
            for warning in training_prompt_warnings(records, self.splits["test"]):
                log.warning(warning)
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
        return {
            "train_data_digest": self.splits["train"].digest,
            "val_data_digest": self.splits["val"].digest,
            "data.canaries": self.canaries,
            "seed_everything": self.seed,
            **self.batching().fingerprint(),
        }

    def cache_folder(self) -> Path:
        """Where the caches of large files are."""
        root = Path(self.trainer.default_root_dir if self.trainer else "runs")
        return expand_user(self.cache_dir, "data.cache_dir") if self.cache_dir else root / "cache"

    def _sources(self, split_name: str) -> tuple[list[str], list[str]]:
        """The files of a split, each once, and a warning if some are named twice."""
        if split_name == "val" and self.files["val"] is None:
            split_name = "train"
        named = arguments.list_sources(split_name, self.files[split_name])
        return drop_repeated(expand_sources(named), f"data.{split_name}_files")

    def _options(self, split_name: str) -> ReadOptions:
        """How the records of a split are read; data.without concerns those that train or choose a checkpoint."""
        without = read_without(self.without) if split_name in ("train", "val") else {}
        return replace(self.read_options, without=tuple(sorted(without)))

    def _context(self) -> int:
        """Positions of the base."""
        return int(read_model_config(resolve_base_model(self.base))["max_position_embeddings"])

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
