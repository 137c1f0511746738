"""ClaimsDataModule: files in, batches out; it only arranges the rooms before it.

    setup     records -> examples, every fault told before a model is loaded
    loaders   plan -> collate, from wherever the run stands

The train loader is told where to start when it is iterated, by the number of optimizer steps taken so far. So a resumed
run needs no state of a loader.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from lightning.pytorch import LightningDataModule
from transformers import PreTrainedTokenizerBase

from lit_phi2.base import find_base, load_tokenizer, read_config
from lit_phi2.batch import Batch, Example, PromptBatch
from lit_phi2.data.collate import collate
from lit_phi2.data.encode import encode
from lit_phi2.data.plan import MicroBatch, Shape, num_batches, num_steps, plan_epoch, plan_evaluation
from lit_phi2.data.prompts import format_prompt
from lit_phi2.data.records import Fault, Fields, Record, raise_faults, read_records
from lit_phi2.errors import InputError

Read = tuple[list[str], list[Record], list[Fault]]  # sources, records, faults
Item = TypeVar("Item")
Made = TypeVar("Made")

DEFAULT_VAL_FRACTION = 0.1
_STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
_PREDICT_TOKENS = 8192  # in a batch of prompts with room for answers: 2.7 GB of keys and values for Phi-2
_PREDICT_PROMPTS = 32


@dataclass(slots=True)
class Split:
    """The examples of one use, and what happened on the way to them.

    Attributes:
        sources: where the records came from.
        records: that became examples.
        examples: in the order of the records.
        bad: records that cannot be used.
        skipped: overlong records, where data.overlong is skip.
    """

    sources: list[str]
    records: list[Record]
    examples: list[Example]
    bad: list[Fault] = field(default_factory=list)
    skipped: list[Fault] = field(default_factory=list)

    @property
    def left_out(self) -> list[Fault]:
        return self.bad + self.skipped

    @property
    def lengths(self) -> list[int]:
        return [len(example.ids) for example in self.examples]

    @property
    def supervised(self) -> list[int]:
        return [example.supervised_tokens for example in self.examples]

    def digest(self) -> str:
        """Of every id, token and prompt length, in order: equal for runs that train on the same thing."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(repr((example.id, example.prompt_length, example.ids)).encode())
        return digest.hexdigest()[:16]


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
        self.base = base
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.splits: dict[str, Split] = {}
        self.answered: set[int] = set()  # of predict_files, by an earlier predict that was killed
        self._check_arguments()

    def setup(self, stage: str) -> None:
        """Read, check and tokenize what the stage needs; a second call finds it done.

        Raises:
            InputError: a source or, unless on_bad_record is skip, a record cannot be used.
        """
        uses = [use for use in _STAGES[stage] if use not in self.splits]
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
        splits = {
            use: self._split(use, read, room if use == "predict" else self.max_length)
            for use, read in self._read_all(uses).items()
        }
        if self.on_bad_record == "error":
            bad = [fault for split in splits.values() for fault in split.bad]
            raise_faults(bad, setting=" and ".join(f"data.{use}_files" for use, split in splits.items() if split.bad))
        for use, split in splits.items():
            if not split.examples:
                raise InputError(
                    f"data.{use}_files: none of the {len(split.left_out)} records can be used. The first: "
                    f"{split.left_out[0]}"
                )
        self.splits |= splits

    def train_dataloader(self) -> "Loader[MicroBatch, Batch]":
        # The length is that of a whole epoch, because Lightning applies limit_train_batches to it once more.
        whole = num_batches(self.splits["train"].lengths, replace(self.shape(), limit=None))
        return Loader(self._training_micro_batches, self._collate("train"), whole)

    def val_dataloader(self) -> "Loader[MicroBatch, Batch]":
        return self._evaluation_loader("val")

    def test_dataloader(self) -> "Loader[MicroBatch, Batch]":
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> "Loader[PromptBatch, PromptBatch]":
        batches = self.predict_batches()
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        mine = batches[rank::world]
        return Loader(lambda: mine, lambda batch: batch, len(mine))

    def predict_batches(self) -> list[PromptBatch]:
        """The batches of prompts that are not yet answered; each is the one that it was, or rounding could differ."""
        return [batch for batch in self.prompt_batches("predict") if not self.answered.issuperset(batch.indices)]

    def prompt_batches(self, use: str, count: int | None = None) -> list[PromptBatch]:
        """The prompts of the first `count` examples, or of all, shortest first, so that a batch is padded little."""
        prompts = [example.ids[: example.prompt_length] for example in self.splits[use].examples[:count]]
        batches: list[PromptBatch] = []
        for index in sorted(range(len(prompts)), key=lambda index: len(prompts[index])):
            prompt = prompts[index]  # lengths rise, so the newest prompt is the longest of its batch
            full = batches and (
                len(batches[-1].prompts) == _PREDICT_PROMPTS
                or (len(batches[-1].prompts) + 1) * (len(prompt) + self.max_new_tokens) > _PREDICT_TOKENS
            )
            if full or not batches:
                batches.append(PromptBatch([], []))
            batches[-1].indices.append(index)
            batches[-1].prompts.append(prompt)
        return batches

    def check_room(self, use: str, count: int | None = None) -> None:
        """Hold the prompts that will be answered against the positions that the base has.

        Raises:
            InputError: a prompt and model.max_new_tokens together are too long; names the first.
        """
        context = int(read_config(find_base(self.base))["max_position_embeddings"])
        for example in self.splits[use].examples[:count]:
            if example.prompt_length + self.max_new_tokens > context:
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
        sources, records, faults = self._read("train")
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
        return num_batches(self.splits["train"].lengths, self.shape())

    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return num_steps(self.num_training_batches(), self.shape().accumulate)

    def identity(self) -> dict[str, Any]:
        """What must stay the same for a resumed run to be the same run."""
        shape = self.shape()
        return {
            "data": self.splits["train"].digest(),
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

    def _read(self, use: str) -> Read:
        files = self.files[use]
        sources = [files] if isinstance(files, str) else list(files or [])
        if not sources or not all(sources):
            raise InputError(f"data.{use}_files: is empty; expected a path or a list of paths.")
        records, faults = read_records(sources, self.fields, needs_response=use != "predict", with_facts=use == "test")
        return sources, records, faults

    def _read_all(self, uses: Sequence[str]) -> dict[str, Read]:
        """What each use reads; validation is held out of the training records where it has no files of its own."""
        if "val" not in uses or self.files["val"] is not None:
            return {use: self._read(use) for use in uses}
        sources, records, faults = self._read("train")
        held_out = [_hash_fraction(record) < self.val_fraction for record in records]
        train = [record for record, held in zip(records, held_out, strict=True) if not held]
        val = [record for record, held in zip(records, held_out, strict=True) if held]
        told_first = bool(faults) and self.on_bad_record == "error"  # the bad records, of which there may be enough
        for name, part in (("training", train), ("validation", val)):
            if records and not part and not told_first:
                raise InputError(
                    f"data.val_fraction: {self.val_fraction} of {len(records)} records leaves none for {name}. "
                    "Give data.val_files, or another fraction."
                )
        return {"train": (sources, train, faults), "val": (sources, val, [])}

    def _split(self, use: str, read: Read, max_length: int) -> Split:
        sources, records, faults = read
        assert self.tokenizer is not None
        encoded = encode(
            records,
            self.tokenizer,
            max_length=max_length,
            overlong=self.overlong,
            with_response=use != "predict",
        )
        return Split(sources, encoded.records, encoded.examples, faults + encoded.faults, encoded.skipped)

    def _training_micro_batches(self) -> list[MicroBatch]:
        """The rest of the epoch in which the run stands, by its number of optimizer steps."""
        assert self.trainer is not None
        split, shape = self.splits["train"], self.shape()
        epoch, step = divmod(self.trainer.global_step, self.steps_per_epoch())
        if self.trainer.overfit_batches > 0:
            epoch = 0  # the same batches in every epoch
        plan = plan_epoch(
            split.lengths, split.supervised, shape, seed=self.seed, epoch=epoch, rank=self.trainer.global_rank
        )
        return plan[step * shape.accumulate :]

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

    def __init__(self, plan: Callable[[], Sequence[Item]], make: Callable[[Item], Made], length: int) -> None:
        self.plan = plan
        self.make = make
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Made]:
        # The plan is asked for now and not at the first batch: Lightning calls this when the run's position is right.
        return map(self.make, self.plan())


def _hash_fraction(record: Record) -> float:
    """A number in [0, 1) from the prompt alone: the same on every machine, and the same for siblings."""
    prompt = format_prompt(record.instruction, record.input)
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") / 2**64
