"""Loaders: a schedule -> batches, and prompts -> batches of similar length.

    ScheduleLoader         micro-batch, micro-batch, ...  ->  Batch, Batch, ...
    LengthSortedPrompts    prompts of 9 41 12 38 tokens   ->  [9 12] [38 41], with their indices 0 2 3 1

Lightning calls iter() on a loader in every epoch and after a resume, so ScheduleLoader computes its schedule at that
moment from the position of the run and stores no state of its own.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import numpy as np

from lit_phi2.data.packing import Array, iter_chunked
from lit_phi2.data.splits import Split
from lit_phi2.types import PromptBatch
from lit_phi2.utils.sequences import Item, LazySequence

Out = TypeVar("Out")

MAX_PROMPTS_PER_BATCH = 32
MAX_TOKENS_PER_PROMPT_BATCH = 8192  # new tokens included; their keys and values take 2.7 GB for Phi-2


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


class LengthSortedPrompts(LazySequence[PromptBatch]):
    """Batches of prompts, shortest first so that they need little padding; each is built when it is indexed.

    Args:
        split: the examples whose prompts are batched.
        count: only the first `count` examples; None for all.
        max_new_tokens: length of a completion, which counts towards the size of a batch.
    """

    def __init__(self, split: Split, count: int | None, max_new_tokens: int) -> None:
        self.examples = split.examples
        lengths = (split.lengths - split.supervised)[:count]
        self.sorted_indices = np.argsort(lengths, kind="stable")
        self.ends: list[int] = []
        start = 0
        for position, length in enumerate(iter_chunked(lengths[self.sorted_indices])):
            size = position - start
            batch_tokens = (size + 1) * (length + max_new_tokens)  # this prompt is the longest of the batch so far
            if size == MAX_PROMPTS_PER_BATCH or (size and batch_tokens > MAX_TOKENS_PER_PROMPT_BATCH):
                self.ends.append(position)
                start = position
        if len(lengths):
            self.ends.append(len(lengths))

    def __len__(self) -> int:
        return len(self.ends)

    def get(self, index: int) -> PromptBatch:
        indices = self.indices(index).tolist()
        examples = [self.examples[index] for index in indices]
        return PromptBatch(indices, [example.ids[: example.prompt_length] for example in examples])

    def indices(self, batch: int) -> Array:
        """The indices of the examples in a batch."""
        return self.sorted_indices[self.ends[batch - 1] if batch else 0 : self.ends[batch]]
