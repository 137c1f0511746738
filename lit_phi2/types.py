"""The values that travel between the data and the model, and the legend of their axes.

    B  rows in a batch      T  tokens in a row      D  width of the model      V  vocabulary

    Example   one record as token ids: prompt, response, end token
    Row       the examples that share one line of a batch, as indices into the list of examples
    Batch     rows as tensors, with their share in the loss of an optimizer step

Labels name their own token: `labels[t]` is `input_ids[t]` where it is supervised and IGNORE_INDEX elsewhere, as in
transformers. The loss does the shift.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Rows are as long as a multiple of so many tokens, so that there are few shapes: MPS keeps memory for each that it has
# seen, and a CPU compiles the products of a new one for longer than they take.
PAD_TO_MULTIPLE_OF = {"mps": 128, "cpu": 32}

IGNORE_INDEX = -100  # the index that torch's cross_entropy skips by default


Row = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """A record after tokenizing.

    Attributes:
        id: of the record.
        ids: prompt, then response, then the end token; the prompt alone where there is nothing to learn (predict).
        prompt_length: tokens of the prompt; the rest is supervised.
        trimmed: whether the input section was shortened to make the example fit.
    """

    id: str
    ids: list[int]
    prompt_length: int
    truncated: bool = False

    @property
    def supervised_tokens(self) -> int:
        return len(self.ids) - self.prompt_length


@dataclass(slots=True)  # not frozen: Lightning refuses frozen dataclasses as batches
class Batch:
    """Rows of examples as tensors.

    Attributes:
        input_ids: (B, T) int64; 0 at padding.
        position_ids: (B, T) int64; restarts at every example, and where padding begins.
        labels: (B, T) int64; IGNORE_INDEX at prompts and padding.
        record_ids: the records in it, to name them when something is wrong.
        num_tokens: of the records, without padding.
        num_supervised: of them, those that are learned.
        share: what summed nats are multiplied by, so that every supervised token of an optimizer step weighs the same.
        seed: of the dropout of this micro-batch.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    record_ids: list[str]
    num_tokens: int
    supervised_tokens: int
    loss_weight: float = 1.0
    seed: int = 0

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch on another device; Lightning calls this."""
        batch = pad_to_multiple(self, PAD_TO_MULTIPLE_OF.get(torch.device(device).type, 1))
        return replace(
            batch,
            input_ids=batch.input_ids.to(device, non_blocking=non_blocking),
            position_ids=batch.position_ids.to(device, non_blocking=non_blocking),
            labels=batch.labels.to(device, non_blocking=non_blocking),
        )


def pad_to_multiple(batch: Batch, multiple: int) -> Batch:
    """The same batch with rows as long as a multiple of so many tokens; what is added counts as one more example."""
    rows, length = batch.input_ids.shape
    added = -length % multiple
    return replace(
        batch,
        input_ids=torch.cat([batch.input_ids, batch.input_ids.new_zeros(rows, added)], 1),
        position_ids=torch.cat([batch.position_ids, torch.arange(added).expand(rows, added)], 1),
        labels=torch.cat([batch.labels, batch.labels.new_full((rows, added), IGNORE_INDEX)], 1),
    )


@dataclass(slots=True)
class PromptBatch:
    """Prompts to answer.

    Attributes:
        indices: where each stands in the input, so that answers can be written in its order.
        prompts: token ids, one list a prompt; lengths differ.
    """

    indices: list[int]
    prompts: list[list[int]]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PromptBatch":
        """Itself: prompts become tensors where they are padded, in `generation.py`."""
        return self
