"""Collate: lay the examples of a row side by side, and stack rows into a Batch.

    position   0 1 2 3 | 0 1 2 | 0 1
    example    A A A A | B B B | . .      (. is padding)

Positions restart at every example; attention finds the boundaries by that. A row must therefore reach the model with
its positions, without an attention mask and without a cache (`model/phi2.py`). The padding of a row counts as one more
example.

Nothing is cut here: `encode.py` has already truncated or removed examples that are longer than a row.
"""

from collections.abc import Sequence

import torch

from lit_phi2.types import IGNORE_INDEX, Batch, Example, Row


def collate(examples: Sequence[Example], rows: Sequence[Row], *, loss_weight: float = 1.0, seed: int = 0) -> Batch:
    """The batch of the given rows, as wide as the longest of them.

    Args:
        examples: all examples of a split.
        rows: indices into examples, row by row. Without rows the batch is one padding token without a label, because
            a rank without rows in a ragged window still takes part in the step.
        loss_weight: factor on the summed nats of the batch.
        seed: for its dropout.
    """
    num_tokens = [sum(len(examples[index].ids) for index in row) for row in rows]
    size = (max(len(rows), 1), max(num_tokens, default=1))
    input_ids = torch.zeros(size, dtype=torch.int64)
    position_ids = torch.zeros(size, dtype=torch.int64)
    labels = torch.full(size, IGNORE_INDEX, dtype=torch.int64)
    for row_index, row in enumerate(rows):
        start = 0
        for index in row:
            example = examples[index]
            end = start + len(example.ids)
            ids = torch.tensor(example.ids)
            input_ids[row_index, start:end] = ids
            position_ids[row_index, start:end] = torch.arange(end - start)
            labels[row_index, start + example.prompt_length : end] = ids[example.prompt_length :]
            start = end
        position_ids[row_index, start:] = torch.arange(size[1] - start)
    laid_out = [examples[index] for row in rows for index in row]
    return Batch(
        input_ids,
        position_ids,
        labels,
        record_ids=[example.id for example in laid_out],
        num_tokens=sum(num_tokens),
        supervised_tokens=sum(example.supervised_tokens for example in laid_out),
        loss_weight=loss_weight,
        seed=seed,
        locations=[example.location for example in laid_out],
    )
