"""Types: the values that travel between data and model, and the legend of their axes.

    B  rows in a batch      T  tokens in a row      D  width of the model      V  size of the vocabulary

    Example   one record as token ids: prompt, response, EOS
    Row       the examples that share one line of a batch, as indices into the list of examples
    Batch     rows as tensors, with their weight in the loss of an optimizer step

Labels name their own token, as in transformers: `labels[t]` is `input_ids[t]` where it is supervised and IGNORE_INDEX
elsewhere. The loss shifts them.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  the name that torch's own documentation uses

IGNORE_INDEX = -100  # the index that torch's cross_entropy skips by default
# Rows are padded to a multiple of this many tokens, so that few shapes occur: MPS keeps memory for each new shape, so
# does torch's allocator on CUDA, and a CPU compiles the matmuls of a new shape for longer than they take.
PAD_TO_MULTIPLE_OF = {"cuda": 64, "mps": 128, "cpu": 32}

Row = tuple[int, ...]
Segment = tuple[int, int]  # first token of an example and the token after its last, among the N = B T tokens of a batch


@dataclass(frozen=True, slots=True)
class Example:
    """A record as token ids.

    Attributes:
        id: of the record.
        ids: prompt, response and EOS; the prompt alone where there is no response (predict).
        prompt_length: tokens of the prompt; all others are supervised.
        truncated_tokens: tokens that its input section lost to make the example fit; at least so many, where the text
            is far longer.
        location: of the record, `path:line`.
    """

    id: str
    ids: list[int]
    prompt_length: int
    truncated_tokens: int = 0
    location: str = ""

    @property
    def truncated(self) -> bool:
        """Whether the input section was shortened."""
        return self.truncated_tokens > 0

    @property
    def supervised_tokens(self) -> int:
        """Tokens of the response, EOS included."""
        return len(self.ids) - self.prompt_length


@dataclass(frozen=True, slots=True)
class Scored:
    """The tokens of a batch whose next token is supervised.

    Attributes:
        positions: (S,) int64, their places among the N tokens.
        targets: (S,) int64, the supervised tokens; IGNORE_INDEX at padding, whose positions are 0.
        count: of them, without padding.
    """

    positions: Tensor
    targets: Tensor
    count: int

    def to(self, device: torch.device, non_blocking: bool = False) -> "Scored":
        """The same on another device, padded like the batch to the multiple that suits it."""
        num_added = -self.count % PAD_TO_MULTIPLE_OF.get(device.type, 1) if device.type != "cpu" else 0
        positions = F.pad(self.positions, (0, num_added))
        targets = F.pad(self.targets, (0, num_added), value=IGNORE_INDEX)
        return Scored(to_device(positions, device, non_blocking), to_device(targets, device, non_blocking), self.count)


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """What the sizes of a step's tensors depend on, found on the host: to ask a GPU for it is to wait for the GPU.

    Attributes:
        segments: of the examples; they cover the N tokens.
        scored: what the loss is of.
    """

    segments: list[Segment]
    scored: Scored


@dataclass(slots=True)  # not frozen: Lightning refuses frozen dataclasses as batches
class Batch:
    """Rows of examples as tensors.

    Attributes:
        input_ids: (B, T) int64; 0 at padding.
        position_ids: (B, T) int64; restarts at every example and where padding begins.
        labels: (B, T) int64; IGNORE_INDEX at prompts and padding.
        record_ids: ids of the records.
        num_tokens: tokens of the records, without padding.
        supervised_tokens: those of them that are supervised.
        loss_weight: factor of the summed nats, so that every supervised token of an optimizer step weighs the same.
        seed: of the dropout in this micro-batch.
        locations: of the records, to name them in an error; their ids may be private.
        layout: of the tokens; None finds it in position_ids and labels.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    record_ids: list[str]
    num_tokens: int
    supervised_tokens: int
    loss_weight: float = 1.0
    seed: int = 0
    locations: list[str] = field(default_factory=list)
    layout: BatchLayout | None = None

    def __post_init__(self) -> None:
        if self.layout is None:
            self.layout = BatchLayout(find_segments(self.position_ids), find_scored(self.labels))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch on another device, padded to the multiple that suits it; Lightning calls this."""
        device = torch.device(device)
        batch = pad_to_multiple(self, PAD_TO_MULTIPLE_OF.get(device.type, 1))
        assert batch.layout is not None
        return replace(
            batch,
            input_ids=to_device(batch.input_ids, device, non_blocking),
            position_ids=to_device(batch.position_ids, device, non_blocking),
            labels=to_device(batch.labels, device, non_blocking),
            layout=replace(batch.layout, scored=batch.layout.scored.to(device, non_blocking)),
        )


def find_segments(position_ids: Tensor) -> list[Segment]:
    """The examples of a batch, of which each begins at position 0.

    >>> find_segments(torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]))
    [(0, 3), (3, 5), (5, 7), (7, 8), (8, 9), (9, 10)]
    """
    starts = torch.nonzero(position_ids.flatten() == 0).flatten().tolist()
    return list(zip(starts, [*starts[1:], position_ids.numel()], strict=True))


def find_scored(labels: Tensor) -> Scored:
    """The tokens among the N whose next token, in the same row, is supervised.

    >>> find_scored(torch.tensor([[IGNORE_INDEX, 7, 8], [9, IGNORE_INDEX, 5]]))
    Scored(positions=tensor([0, 1, 4]), targets=tensor([7, 8, 5]), count=3)
    """
    positions = torch.nonzero(F.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1)).flatten()).flatten()
    return Scored(positions, labels.flatten()[positions + 1], len(positions))


def to_device(tensor: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
    """A copy on the device; for CUDA from pinned memory, because the host waits for a copy from other memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device, non_blocking=non_blocking)


def pad_to_multiple(batch: Batch, multiple: int) -> Batch:
    """The same batch, its rows padded to a multiple of this many tokens; the padding is one more example."""
    num_rows, length = batch.input_ids.shape
    num_added = -length % multiple
    return replace(
        batch,
        input_ids=torch.cat([batch.input_ids, batch.input_ids.new_zeros(num_rows, num_added)], 1),
        position_ids=torch.cat([batch.position_ids, torch.arange(num_added).expand(num_rows, num_added)], 1),
        labels=torch.cat([batch.labels, batch.labels.new_full((num_rows, num_added), IGNORE_INDEX)], 1),
        layout=batch.layout if not num_added else None,
    )


@dataclass(slots=True)
class PromptBatch:
    """Prompts to complete.

    Attributes:
        indices: the place of each prompt in the input, so that completions can be written in its order.
        prompts: token ids, one list per prompt; lengths differ.
    """

    indices: list[int]
    prompts: list[list[int]]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PromptBatch":
        """Itself: `generation/engine.py` makes the tensors where it pads the prompts. Lightning calls this."""
        return self
