"""Loaders: a schedule -> batches, and prompts -> batches in the order in which they are completed.

    ScheduleLoader    micro-batch, micro-batch, ...  ->  Batch, Batch, ...
    OrderedPrompts    prompts of 9 41 12 38 tokens   ->  [41 38] [12 9], with their indices 1 3 2 0

Lightning calls iter() on a loader in every epoch and after a resume, so ScheduleLoader computes its schedule at that
moment from the position of the run and stores no state of its own.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import numpy as np

from lit_phi2.data.packing import Array
from lit_phi2.data.splits import Split
from lit_phi2.types import PromptBatch
from lit_phi2.utils.sequences import Item, LazySequence

Out = TypeVar("Out")

PROMPTS_PER_BATCH = 32  # the unit of trainer.limit_predict_batches; the engine takes prompts across batches


def prompt_order(lengths: Array) -> Array:
    """The order in which prompts are completed: longest first.

    The first prompts then show how much memory a slot needs, and the last to end are short.
    """
    return np.argsort(-lengths, kind="stable")


class ScheduleLoader(Generic[Item, Out]):
    """Builds a batch for each item of a schedule.

    Args:
        schedule: called at each iteration; returns the rest of the epoch.
        build: item of the schedule -> batch.
        length: items in a whole epoch.
    """

    def __init__(self, schedule: Callable[[], Iterable[Item]], build: Callable[[Item], Out], length: int) -> None:
        self.schedule = schedule
        self.build = build
        self.length = length

    def __len__(self) -> int:
        return self.length

    def state_dict(self) -> dict[str, Any]:
        """Nothing; with this method Lightning knows that the loader continues where a resumed run is."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing."""

    def __iter__(self) -> Iterator[Out]:
        # schedule() is called here and not at the first batch: Lightning calls iter() when the run's position is right.
        return map(self.build, self.schedule())


class OrderedPrompts(LazySequence[PromptBatch]):
    """Batches of prompts, each built when it is indexed.

    Args:
        split: the examples whose prompts are batched.
        indices: of the examples, in the order of completion.
    """

    def __init__(self, split: Split, indices: Array) -> None:
        self.split = split
        self.indices = indices

    def __len__(self) -> int:
        return -(-len(self.indices) // PROMPTS_PER_BATCH)

    def get(self, index: int) -> PromptBatch:
        indices = self.indices[index * PROMPTS_PER_BATCH :][:PROMPTS_PER_BATCH].tolist()
        examples = [self.split.examples[index] for index in indices]
        return PromptBatch(indices, [example.ids[: example.prompt_length] for example in examples])

    def share(self, rank: int, world_size: int) -> "OrderedPrompts":
        """Every world_size-th prompt: what one of several processes completes."""
        return OrderedPrompts(self.split, self.indices[rank::world_size])


def order_prompts(split: Split, indices: Array) -> OrderedPrompts:
    """The prompts of some examples in batches, in `prompt_order`.

    Args:
        split: the examples.
        indices: of those to complete.
    """
    lengths = (split.lengths - split.supervised)[indices]
    return OrderedPrompts(split, indices[prompt_order(lengths)])
