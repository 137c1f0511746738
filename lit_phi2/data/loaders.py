"""data/loaders.py."""

from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

import numpy as np

from lit_phi2.data.packing import Array, iter_chunked
from lit_phi2.data.splits import Split
from lit_phi2.types import PromptBatch
from lit_phi2.utils.sequences import Item, LazySequence

Out = TypeVar("Out")

_PREDICT_TOKENS = 8192  # in a batch of prompts with room for answers: 2.7 GB of keys and values for Phi-2

_PREDICT_PROMPTS = 32


class ScheduleLoader(Generic[Item, Out]):
    """Batches in the order of a plan that is asked for anew at every iteration.

    Args:
        plan: gives what is left of the epoch.
        make: makes a batch of one part of the plan.
        length: parts in a whole epoch.
    """

    def __init__(self, schedule: Callable[[], Iterable[Item]], make: Callable[[Item], Out], length: int) -> None:
        self.plan = schedule
        self.make = make
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Out]:
        # The plan is asked for now and not at the first batch: Lightning calls this when the run's position is right.
        return map(self.make, self.plan())


class LengthSortedPrompts(LazySequence[PromptBatch]):
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
        for place, length in enumerate(
            iter_chunked(lengths[self.order])
        ):  # the newest prompt is the longest of its batch
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
