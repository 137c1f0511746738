"""Collate: lay the examples of a row side by side, and stack rows into a Batch.

    position   0 1 2 3 | 0 1 2 | 0 1
    example    A A A A | B B B | . .      (. is padding)

Positions restart at every example. That restart is how attention knows where one ends, so a row must reach the model
with its positions, no attention mask and no cache (`model/phi2.py`). The padding of a row counts as one more example.

Nothing is cut or dropped here; an example longer than a row was settled in `encode.py`.
"""

from collections.abc import Sequence

import torch

from lit_phi2.types import IGNORE_INDEX, Batch, Example, Row


def collate(examples: Sequence[Example], rows: Sequence[Row], *, loss_weight: float = 1.0, seed: int = 0) -> Batch:
    """The batch of some rows, as wide as the longest of them.

    Args:
        examples: all examples.
        rows: indices into them, row by row. None gives one padding token without a label: a rank that has nothing
            to do in a ragged window still takes part in the step.
        share: of the batch in the loss of its window.
        seed: of its dropout.
    """
    num_tokens = [sum(len(examples[index].ids) for index in row) for row in rows]
    size = (max(len(rows), 1), max(num_tokens, default=1))
    input_ids = torch.zeros(size, dtype=torch.int64)
    position_ids = torch.zeros(size, dtype=torch.int64)
    labels = torch.full(size, IGNORE_INDEX, dtype=torch.int64)
    for line, row in enumerate(rows):
        start = 0
        for index in row:
            example = examples[index]
            end = start + len(example.ids)
            ids = torch.tensor(example.ids)
            input_ids[line, start:end] = ids
            position_ids[line, start:end] = torch.arange(end - start)
            labels[line, start + example.prompt_length : end] = ids[example.prompt_length :]
            start = end
        position_ids[line, start:] = torch.arange(size[1] - start)
    record_ids = [examples[index].id for row in rows for index in row]
    supervised = sum(examples[index].supervised_tokens for row in rows for index in row)
    return Batch(input_ids, position_ids, labels, record_ids, sum(num_tokens), supervised, loss_weight, seed)
