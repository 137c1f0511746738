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
from typing import Any, Generic, TypeVar

import numpy as np
from lightning.pytorch import LightningDataModule
from transformers import PreTrainedTokenizerBase

from lit_phi2.base import find_base, load_tokenizer, read_config
from lit_phi2.batch import TEMPLATE_VERSION, Batch, Example, Item, MadeWhenAsked, PromptBatch
from lit_phi2.data.collate import collate
from lit_phi2.data.encode import each_example
from lit_phi2.data.plan import (
    Array,
    MicroBatch,
    Shape,
    in_pieces,
    num_batches,
    num_rows,
    num_steps,
    plan_epoch,
    plan_evaluation,
)
from lit_phi2.data.prompts import format_prompt
from lit_phi2.data.records import Fault, Fields, Record, each_record, raise_faults, read_records
from lit_phi2.data.store import IN_MEMORY, Split, in_memory, on_disk
from lit_phi2.errors import InputError
from lit_phi2.files import digest

Made = TypeVar("Made")

DEFAULT_VAL_FRACTION = 0.1
_STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
_PREDICT_TOKENS = 8192  # in a batch of prompts with room for answers: 2.7 GB of keys and values for Phi-2
_PREDICT_PROMPTS = 32


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
        overlong: trim (the input section only), skip or error.
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
        overlong: str = "trim",
        on_bad_record: str = "error",
        cache_dir: str | None = None,
        base: str = "tiny",
        max_new_tokens: int = 256,
        seed: int = 42,
    ) -> None:
        super().__init__()
        self.files = {"train": train_files, "val": val_files, "test": test_files, "predict": predict_files}
        self.fields = Fields(instruction_field, input_field, response_field, id_field)
        self.val_fraction = val_fraction
        self.max_length = max_length
        self.packing = packing
        self.batch_size = batch_size
        self.overlong = overlong
        self.on_bad_record = on_bad_record
        self.cache_dir = cache_dir
        self.base = base
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.splits: dict[str, Split] = {}
        self.answered: Array = np.zeros(0, np.int64)  # of predict_files, by an earlier predict that was killed
        self._check_arguments()

    def setup(self, stage: str) -> None:
        """Read, check and tokenize what the stage needs; a second call finds it done.

        Raises:
            InputError: a source or, unless on_bad_record is skip, a record cannot be used.
        """
        stages = _STAGES[stage]
        if "val" in stages and self.files["val"] is None:
            stages = ("train", "val")  # whose records are those that the other leaves
        uses = [use for use in stages if use not in self.splits]
        if not uses:
            return
        base = find_base(self.base)
        context = int(read_config(base)["max_position_embeddings"])
        if self.max_length > context:
            raise InputError(
                f"data.max_length: {self.max_length} is more than the {context} positions of base {self.base!r}."
            )
        room = context - self.max_new_tokens
        if "predict" in uses and room < 1:
            raise InputError(
                f"model.max_new_tokens: {self.max_new_tokens} leaves no room for a prompt in the {context} positions "
                f"of base {self.base!r}."
            )
        self.tokenizer = self.tokenizer or load_tokenizer(base)
        splits = {use: self._split(use, room if use == "predict" else self.max_length) for use in uses}
        if self.on_bad_record == "error":
            bad = [fault for split in splits.values() for fault in split.bad]
            raise_faults(bad, setting=" and ".join(f"data.{use}_files" for use, split in splits.items() if split.bad))
        for use, split in splits.items():
            if not split.examples:
                raise InputError(self._why_empty(use, split, splits))
        self.splits |= splits

    def train_dataloader(self) -> "Loader[MicroBatch, Batch]":
        # The length is that of a whole epoch, because Lightning applies limit_train_batches to it once more.
        whole = num_batches(self._num_rows(), replace(self.shape(), limit=None))
        return Loader(self._training_micro_batches, self._collate("train"), whole)

    def val_dataloader(self) -> "Loader[MicroBatch, Batch]":
        return self._evaluation_loader("val")

    def test_dataloader(self) -> "Loader[MicroBatch, Batch]":
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> "Loader[int, PromptBatch]":
        batches, left = self.prompt_batches("predict"), self.unanswered()
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        mine = left[rank::world]
        return Loader(lambda: mine, batches.__getitem__, len(mine))

    def unanswered(self) -> list[int]:
        """The batches of prompts that are left; each is the one that it was, or rounding could differ."""
        batches = self.prompt_batches("predict")
        answered = np.zeros(len(self.splits["predict"].examples), bool)
        answered[self.answered] = True
        return [number for number in range(len(batches)) if not answered[batches.indices(number)].all()]

    def prompt_batches(self, use: str, count: int | None = None) -> "PromptBatches":
        """The prompts of the first `count` examples, or of all."""
        return PromptBatches(self.splits[use], count, self.max_new_tokens)

    def check_room(self, use: str, count: int | None = None) -> None:
        """Hold the prompts that will be answered against the positions that the base has.

        Raises:
            InputError: a prompt and model.max_new_tokens together are too long; names the first.
        """
        context = int(read_config(find_base(self.base))["max_position_embeddings"])
        split = self.splits[use]
        prompts = (split.lengths - split.supervised)[:count]
        for index in np.flatnonzero(prompts + self.max_new_tokens > context).tolist():
            example = split.examples[index]
            raise InputError(
                f"model.max_new_tokens: {self.max_new_tokens} after the {example.prompt_length} tokens of prompt "
                f"{example.id!r} in data.{use}_files is more than the {context} positions of base {self.base!r}. "
                "Lower it, or data.max_length, or measure the loss alone with --answers 0."
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

    def shape(self) -> Shape:
        """How the Trainer's settings and ours cut a training epoch."""
        trainer = self.trainer
        assert trainer is not None
        limit = trainer.limit_train_batches
        return Shape(
            max_length=self.max_length,
            packing=self.packing,
            batch_size=self.batch_size,
            accumulate=trainer.accumulate_grad_batches,
            world_size=trainer.world_size,
            limit=None if isinstance(limit, float) and limit == 1.0 else limit,
        )

    def num_training_batches(self) -> int:
        """Micro-batches of each rank in an epoch."""
        return num_batches(self._num_rows(), self.shape())

    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return num_steps(self.num_training_batches(), self.shape().accumulate)

    def identity(self) -> dict[str, Any]:
        """What must stay the same for a resumed run to be the same run."""
        shape = self.shape()
        return {
            "data": self.splits["train"].digest,
            "data.max_length": self.max_length,
            "data.packing": self.packing,
            "data.batch_size": self.batch_size,
            "seed_everything": self.seed,
            # The same windows of rows on another number of processes are the same steps.
            "rows in an optimizer step": self.batch_size * shape.accumulate * shape.world_size,
            "trainer.limit_train_batches, of all processes": (
                shape.limit * shape.world_size if isinstance(shape.limit, int) else shape.limit
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

    def _sources(self, use: str) -> list[str]:
        files = self.files[use]
        sources = [files] if isinstance(files, str) else list(files or [])
        if not sources or not all(sources):
            raise InputError(f"data.{use}_files: is empty; expected a path or a list of paths.")
        return sources

    def _split(self, use: str, max_length: int) -> Split:
        """The examples of a use; validation is held out of the training records where it has no files of its own."""
        held_out = self.files["val"] is None and use in ("train", "val")
        sources = self._sources("train" if held_out else use)
        options: dict[str, Any] = {"needs_response": use != "predict", "with_facts": use == "test"}
        limits: dict[str, Any] = {"max_length": max_length, "overlong": self.overlong}
        tokenizer = self.tokenizer
        assert tokenizer is not None

        def make(bad: list[Fault]) -> Iterator[tuple[Record, Example | Fault]]:
            found = each_record(sources, self.fields, **options)
            if held_out and use == "val":
                found = (one for one in found if isinstance(one, Record) and self._is_held_out(one))
            elif held_out:
                found = (one for one in found if isinstance(one, Fault) or not self._is_held_out(one))
            return each_example(_records(found, bad), tokenizer, **limits, with_response=use != "predict")

        skip = self.overlong == "skip"
        files = [Path(source).expanduser() for source in sources]
        if sum(file.stat().st_size for file in files if file.is_file()) <= IN_MEMORY:
            return in_memory(sources, make, skip=skip)
        key = {
            "sources": sources,
            "files": [_state(file) for file in files],
            "fields": asdict(self.fields),
            "held out": (use, self.val_fraction) if held_out else None,
            "template": TEMPLATE_VERSION,
            "tokenizer": digest([tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id]),
            **options,
            **limits,
        }
        root = Path(self.trainer.default_root_dir if self.trainer else "runs")
        cache_dir = Path(self.cache_dir).expanduser() if self.cache_dir else root / "cache"
        return on_disk(sources, make, skip=skip, cache_dir=cache_dir, key=key)

    def _is_held_out(self, record: Record) -> bool:
        return _hash_fraction(record) < self.val_fraction

    def _why_empty(self, use: str, split: Split, splits: dict[str, Split]) -> str:
        if not split.left_out or (use == "train" and self.files["val"] is None and splits["val"].examples):
            total = sum(len(other.examples) for other in splits.values())
            name = {"train": "training", "val": "validation"}[use]
            return (
                f"data.val_fraction: {self.val_fraction} of {total} records leaves none for {name}. "
                "Give data.val_files, or another fraction."
            )
        return (
            f"data.{use}_files: none of the {len(split.left_out)} records can be used. The first: {split.left_out[0]}"
        )

    def _num_rows(self) -> int:
        split = self.splits["train"]
        if split.num_rows is None:  # counting takes seconds where there are millions
            split.num_rows = num_rows(split.lengths, self.shape())
        return split.num_rows

    def _training_micro_batches(self) -> Iterator[MicroBatch]:
        """The rest of the epoch in which the run stands, by its number of optimizer steps."""
        assert self.trainer is not None
        split, shape = self.splits["train"], self.shape()
        epoch, step = divmod(self.trainer.global_step, self.steps_per_epoch())
        if self.trainer.overfit_batches > 0:
            epoch = 0  # the same batches in every epoch
        plan = plan_epoch(
            split.lengths, split.supervised, shape, seed=self.seed, epoch=epoch, rank=self.trainer.global_rank
        )
        return (plan[index] for index in range(step * shape.accumulate, len(plan)))

    def _evaluation_loader(self, use: str) -> "Loader[MicroBatch, Batch]":
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        shape = Shape(self.max_length, self.packing, self.batch_size, world_size=world)
        plan = plan_evaluation(self.splits[use].lengths, shape, rank=rank)
        return Loader(lambda: plan, self._collate(use), len(plan))

    def _collate(self, use: str) -> Callable[[MicroBatch], Batch]:
        examples = self.splits[use].examples
        return lambda micro: collate(examples, micro.rows, share=micro.share, seed=micro.seed)


class Loader(Generic[Item, Made]):
    """Batches in the order of a plan that is asked for anew at every iteration.

    Args:
        plan: gives what is left of the epoch.
        make: makes a batch of one part of the plan.
        length: parts in a whole epoch.
    """

    def __init__(self, plan: Callable[[], Iterable[Item]], make: Callable[[Item], Made], length: int) -> None:
        self.plan = plan
        self.make = make
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Made]:
        # The plan is asked for now and not at the first batch: Lightning calls this when the run's position is right.
        return map(self.make, self.plan())


class PromptBatches(MadeWhenAsked[PromptBatch]):
    """Prompts to answer, shortest first, so that a batch is padded little; each batch is made when it is asked for.

    Args:
        split: whose prompts.
        count: how many, from the first; None for all.
        max_new_tokens: of an answer, which a batch has room for.
    """

    def __init__(self, split: Split, count: int | None, max_new_tokens: int) -> None:
        self.examples = split.examples
        lengths = (split.lengths - split.supervised)[:count]
        self.order = np.argsort(lengths, kind="stable")
        self.ends: list[int] = []
        start = 0
        for place, length in enumerate(in_pieces(lengths[self.order])):  # the newest prompt is the longest of its batch
            size = place - start
            if size == _PREDICT_PROMPTS or (size and (size + 1) * (length + max_new_tokens) > _PREDICT_TOKENS):
                self.ends.append(place)
                start = place
        if len(lengths):
            self.ends.append(len(lengths))

    def __len__(self) -> int:
        return len(self.ends)

    def make(self, index: int) -> PromptBatch:
        indices = self.indices(index).tolist()
        examples = [self.examples[index] for index in indices]
        return PromptBatch(indices, [example.ids[: example.prompt_length] for example in examples])

    def indices(self, number: int) -> Array:
        """Of the prompts in a batch."""
        return self.order[self.ends[number - 1] if number else 0 : self.ends[number]]


def _records(found: Iterable[Record | Fault], faults: list[Fault]) -> Iterator[Record]:
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
