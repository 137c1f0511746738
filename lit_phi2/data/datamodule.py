"""ClaimsDataModule: files in, batches out; it only arranges the rooms before it.

    setup     records -> examples, every fault told before a model is loaded
    loaders   plan -> collate, from wherever the run stands

The train loader is told where to start when it is iterated, by the number of optimizer steps taken so far. So a resumed
run needs no state of a loader.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from transformers import PreTrainedTokenizerBase

from lit_phi2.data.cache import MAX_IN_MEMORY_BYTES, load_or_build_cache
from lit_phi2.data.collate import collate
from lit_phi2.data.encode import iter_examples
from lit_phi2.data.loaders import LengthSortedPrompts, ScheduleLoader
from lit_phi2.data.packing import Array
from lit_phi2.data.prompts import TEMPLATE_VERSION, format_prompt
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
from lit_phi2.data.splits import Split, build_split
from lit_phi2.errors import InputError
from lit_phi2.pretrained import load_tokenizer, read_model_config, resolve_base_model
from lit_phi2.types import Batch, Example, PromptBatch
from lit_phi2.utils.files import tree_digest

DEFAULT_VAL_FRACTION = 0.1

_STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}


class ClaimsDataModule(LightningDataModule):
    """Instruction/response records, tokenized for the base and packed.

    Args:
        train_files: a path, a list of paths, claims:SPLIT (packaged; claims:train[:1700] for the first of it) or
            hub:owner/name[:split]. The ending gives the format: .jsonl, .json, .csv or .parquet.
        val_files: likewise; null takes val_fraction of the training records.
        test_files: likewise.
        predict_files: likewise; a response is not needed there.
        instruction_field: where a record keeps its instruction.
        input_field: where it keeps its input; may be absent.
        response_field: where it keeps its response.
        id_field: where it keeps its id; may be absent, then it is <file name>:<line>.
        val_fraction: of the records, used when val_files is null. Records with the same prompt stay together.
        max_length: tokens in an example, end token included, and in a packed row.
        packing: several examples to a row, kept apart.
        batch_size: rows in a micro-batch.
        on_overlong: trim (the input section only), skip or error.
        on_bad_record: error names every bad record and stops; skip leaves them out and writes rejected.jsonl.
        cache_dir: where the tokens of files above 64 MiB are kept on disk, with the texts of their records; null takes
            the folder cache in trainer.default_root_dir. Of smaller files nothing is written.
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
        self.completed: Array = np.zeros(0, np.int64)  # of predict_files, by an earlier predict that was killed
        self._check_arguments()

    def setup(self, stage: str) -> None:
        """Read, check and tokenize what the stage needs; a second call finds it done.

        Raises:
            InputError: a source or, unless on_bad_record is skip, a record cannot be used.
        """
        stages = _STAGES[stage]
        if "val" in stages and self.files["val"] is None:
            stages = ("train", "val")  # whose records are those that the other leaves
        split_names = [split_name for split_name in stages if split_name not in self.splits]
        if not split_names:
            return
        base = resolve_base_model(self.base)
        context = int(read_model_config(base)["max_position_embeddings"])
        if self.max_length > context:
            raise InputError(
                f"data.max_length: {self.max_length} is more than the {context} positions of base {self.base!r}."
            )
        token_budget = context - self.max_new_tokens
        if "predict" in split_names and token_budget < 1:
            raise InputError(
                f"model.max_new_tokens: {self.max_new_tokens} leaves no room for a prompt in the {context} positions "
                f"of base {self.base!r}."
            )
        self.tokenizer = self.tokenizer or load_tokenizer(base)
        splits = {
            split_name: self._split(split_name, token_budget if split_name == "predict" else self.max_length)
            for split_name in split_names
        }
        if self.on_bad_record == "error":
            invalid = [fault for split in splits.values() for fault in split.invalid]
            raise_invalid(
                invalid,
                setting=" and ".join(
                    f"data.{split_name}_files" for split_name, split in splits.items() if split.invalid
                ),
            )
        for split_name, split in splits.items():
            if not split.examples:
                raise InputError(self._why_empty(split_name, split, splits))
        self.splits |= splits

    def train_dataloader(self) -> "ScheduleLoader[MicroBatch, Batch]":
        # The length is that of a whole epoch, because Lightning applies limit_train_batches to it once more.
        whole = num_batches(self._num_rows(), replace(self.batching(), limit=None))
        return ScheduleLoader(self._training_micro_batches, self._collate("train"), whole)

    def val_dataloader(self) -> "ScheduleLoader[MicroBatch, Batch]":
        return self._evaluation_loader("val")

    def test_dataloader(self) -> "ScheduleLoader[MicroBatch, Batch]":
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> "ScheduleLoader[int, PromptBatch]":
        batches, left = self.prompt_batches("predict"), self.pending()
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        mine = left[rank::world]
        return ScheduleLoader(lambda: mine, batches.__getitem__, len(mine))

    def pending(self) -> list[int]:
        """The batches of prompts that are left; each is the one that it was, or rounding could differ."""
        batches = self.prompt_batches("predict")
        completed = np.zeros(len(self.splits["predict"].examples), bool)
        completed[self.completed] = True
        return [number for number in range(len(batches)) if not completed[batches.indices(number)].all()]

    def prompt_batches(self, split_name: str, count: int | None = None) -> "LengthSortedPrompts":
        """The prompts of the first `count` examples, or of all."""
        return LengthSortedPrompts(self.splits[split_name], count, self.max_new_tokens)

    def check_context_length(self, split_name: str, count: int | None = None) -> None:
        """Hold the prompts that will be answered against the positions that the base has.

        Raises:
            InputError: a prompt and model.max_new_tokens together are too long; names the first.
        """
        context = int(read_model_config(resolve_base_model(self.base))["max_position_embeddings"])
        split = self.splits[split_name]
        prompts = (split.lengths - split.supervised)[:count]
        for index in np.flatnonzero(prompts + self.max_new_tokens > context).tolist():
            example = split.examples[index]
            raise InputError(
                f"model.max_new_tokens: {self.max_new_tokens} after the {example.prompt_length} tokens of prompt "
                f"{example.id!r} in data.{split_name}_files is more than the {context} positions of base {self.base!r}. "
                "Lower it, or data.max_length, or measure the loss alone with --max_completions 0."
            )

    def training_records(self) -> list[Record]:
        """The records of train_files, as text: the test's baseline looks an answer up in them.

        Raises:
            InputError: a source cannot be read, or none of its records.
        """
        sources = self._sources("train")
        records, faults = read_records(sources, self.fields, needs_response=True)
        if not records:
            raise InputError(f"{', '.join(sources)}: none of the records can be used. The first: {faults[0]}")
        return records

    def batching(self) -> BatchingConfig:
        """How the Trainer's settings and ours cut a training epoch."""
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

    def identity(self) -> dict[str, Any]:
        """What must stay the same for a resumed run to be the same run."""
        batching = self.batching()
        return {
            "train_data_digest": self.splits["train"].digest,
            "data.max_length": self.max_length,
            "data.packing": self.packing,
            "data.batch_size": self.batch_size,
            "seed_everything": self.seed,
            # The same windows of rows on another number of processes are the same steps.
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

    def _split(self, split_name: str, max_length: int) -> Split:
        """The examples of a use; validation is held out of the training records where it has no files of its own."""
        held_out = self.files["val"] is None and split_name in ("train", "val")
        sources = self._sources("train" if held_out else split_name)
        options: dict[str, Any] = {"needs_response": split_name != "predict", "with_facts": split_name == "test"}
        limits: dict[str, Any] = {"max_length": max_length, "on_overlong": self.on_overlong}
        tokenizer = self.tokenizer
        assert tokenizer is not None

        def make(invalid: list[InvalidRecord]) -> Iterator[tuple[Record, Example | InvalidRecord]]:
            found = iter_records(sources, self.fields, **options)
            if held_out and split_name == "val":
                found = (one for one in found if isinstance(one, Record) and self._is_held_out(one))
            elif held_out:
                found = (one for one in found if isinstance(one, InvalidRecord) or not self._is_held_out(one))
            return iter_examples(_records(found, invalid), tokenizer, **limits, with_response=split_name != "predict")

        skip = self.on_overlong == "skip"
        files = [Path(source).expanduser() for source in sources]
        if sum(file.stat().st_size for file in files if file.is_file()) <= MAX_IN_MEMORY_BYTES:
            return build_split(sources, make, skip=skip)
        key = {
            "sources": sources,
            "files": [_state(file) for file in files],
            "fields": asdict(self.fields),
            "held out": (split_name, self.val_fraction) if held_out else None,
            "template": TEMPLATE_VERSION,
            "tokenizer": tree_digest([tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id]),
            **options,
            **limits,
        }
        root = Path(self.trainer.default_root_dir if self.trainer else "runs")
        cache_dir = Path(self.cache_dir).expanduser() if self.cache_dir else root / "cache"
        return load_or_build_cache(sources, make, skip=skip, cache_dir=cache_dir, key=key)

    def _is_held_out(self, record: Record) -> bool:
        return _hash_fraction(record) < self.val_fraction

    def _why_empty(self, split_name: str, split: Split, splits: dict[str, Split]) -> str:
        if not split.left_out or (split_name == "train" and self.files["val"] is None and splits["val"].examples):
            total = sum(len(other.examples) for other in splits.values())
            name = {"train": "training", "val": "validation"}[split_name]
            return (
                f"data.val_fraction: {self.val_fraction} of {total} records leaves none for {name}. "
                "Give data.val_files, or another fraction."
            )
        return f"data.{split_name}_files: none of the {len(split.left_out)} records can be used. The first: {split.left_out[0]}"

    def _num_rows(self) -> int:
        split = self.splits["train"]
        if split.num_rows is None:  # counting takes seconds where there are millions
            split.num_rows = num_rows(split.lengths, self.batching())
        return split.num_rows

    def _training_micro_batches(self) -> Iterator[MicroBatch]:
        """The rest of the epoch in which the run stands, by its number of optimizer steps."""
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
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        batching = BatchingConfig(self.max_length, self.packing, self.batch_size, world_size=world)
        schedule = evaluation_schedule(self.splits[split_name].lengths, batching, rank=rank)
        return ScheduleLoader(lambda: schedule, self._collate(split_name), len(schedule))

    def _collate(self, split_name: str) -> Callable[[MicroBatch], Batch]:
        examples = self.splits[split_name].examples
        return lambda micro: collate(examples, micro.rows, loss_weight=micro.loss_weight, seed=micro.seed)


def _records(found: Iterable[Record | InvalidRecord], faults: list[InvalidRecord]) -> Iterator[Record]:
    """The records; what is none goes into the list."""
    for one in found:
        if isinstance(one, Record):
            yield one
        else:
            faults.append(one)


def _state(file: Path) -> list[Any] | None:
    """What changes whenever the file does; None for what is no file on this machine."""
    if not file.is_file():
        return None
    found = file.stat()
    return [str(file.absolute()), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _hash_fraction(record: Record) -> float:
    """A number in [0, 1) from the prompt alone: the same on every machine, and the same for siblings."""
    prompt = format_prompt(record.instruction, record.input)
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") / 2**64
