"""Checks of splits that were read: nothing invalid, nothing empty, and space for completions.

Split.invalid, no example      ->  InputError, for all splits at once
Split.truncated                ->  a warning
prompts and max_new_tokens     ->  InputError if they exceed the positions of the base
"""

from collections.abc import Mapping

import numpy as np

from lit_phi2.data.invalid import raise_invalid
from lit_phi2.data.splits import Split
from lit_phi2.errors import InputError


def check_splits(splits: Mapping[str, Split], *, allow_invalid: bool, held_out: float | None) -> None:
    """Check that splits which were read together can be used.

    Args:
        splits: by name.
        allow_invalid: whether invalid records are left out.
        held_out: data.val_fraction if train and val are parts of the same files; otherwise None.

    Raises:
        InputError: a record is invalid, or a split has no examples.
    """
    if not allow_invalid:
        setting = " and ".join(f"data.{name}_files" for name, split in splits.items() if split.invalid)
        raise_invalid([record for split in splits.values() for record in split.invalid], setting=setting)
    for name, split in splits.items():
        if not split.examples:
            raise InputError(_explain_empty(name, splits, held_out))


def _explain_empty(split_name: str, splits: Mapping[str, Split], held_out: float | None) -> str:
    """Why a split has no examples."""
    left_out = splits[split_name].left_out
    if not left_out or (split_name == "train" and held_out is not None and splits["val"].examples):
        total = sum(len(split.examples) for split in splits.values())
        part = {"train": "training", "val": "validation"}[split_name]
        return (
            f"data.val_fraction: {held_out} of {total} records leaves none for {part}. "
            "Give data.val_files, or another fraction."
        )
    return f"data.{split_name}_files: none of the {len(left_out)} records can be used. The first: {left_out[0]}"


def truncation_warnings(splits: Mapping[str, Split]) -> list[str]:
    """A warning for each split with inputs that were shortened."""
    return [
        f"data.{name}_files: the input of {split.truncated} records was shortened to make them fit"
        for name, split in splits.items()
        if split.truncated
    ]


def check_prompts_fit(
    split: Split, count: int | None, split_name: str, max_new_tokens: int, context: int, base: str
) -> None:
    """Check that prompts, each with max_new_tokens, fit into the positions of the base.

    Args:
        split: the examples.
        count: check the first `count`; None for all.
        split_name: for the message.
        max_new_tokens: model.max_new_tokens.
        context: positions of the base.
        base: its name, for the message.

    Raises:
        InputError: a prompt is too long; names the first.
    """
    prompt_lengths = (split.lengths - split.supervised)[:count]
    for index in np.flatnonzero(prompt_lengths + max_new_tokens > context).tolist():
        cure = ", or measure the loss alone with --max_completions 0" if split_name == "test" else ""
        raise InputError(
            f"model.max_new_tokens: {max_new_tokens} after the {prompt_lengths[index]} tokens of the prompt at "
            f"{split.records[index].location} is more than the {context} positions of base {base!r}. Lower it, or "
            f"data.max_length{cure}."
        )
