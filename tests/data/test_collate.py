"""Collate: rows, positions and labels written by hand."""

import torch

from lit_phi2.data.collate import collate
from lit_phi2.types import Example

A = Example("a", [11, 12, 13, 14], prompt_length=2)  # 13 and 14 are supervised
B = Example("b", [21, 22, 0], prompt_length=1)  # 22 and 0 are supervised; 0 is also the id of padding
C = Example("c", [31, 32], prompt_length=2)  # a prompt alone
_ = -100


def test_examples_of_a_row_are_joined_and_short_rows_padded() -> None:
    batch = collate([A, B, C], [(0, 1), (2,)])
    assert batch.input_ids.tolist() == [[11, 12, 13, 14, 21, 22, 0], [31, 32, 0, 0, 0, 0, 0]]


def test_positions_restart_at_every_example_and_at_padding() -> None:
    batch = collate([A, B, C], [(0, 1), (2,)])
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4]]


def test_labels_are_the_ids_except_at_prompts_and_padding() -> None:
    """The EOS token of B has the id of padding and is supervised nevertheless."""
    batch = collate([A, B, C], [(0, 1), (2,)])
    assert batch.labels.tolist() == [[_, _, 13, 14, _, 22, 0], [_, _, _, _, _, _, _]]


def test_the_first_label_of_every_example_is_ignored() -> None:
    """Otherwise an example would be trained to predict the first token of its neighbor."""
    batch = collate([A, B, C], [(1, 0, 2), (0, 1)])
    starts = batch.position_ids == 0
    assert starts.sum() == 5 + 1  # five examples, and the padding of the second row
    assert set(batch.labels[starts].tolist()) == {_}


def test_rows_may_be_in_any_order() -> None:
    batch = collate([A, B, C], [(1,), (0,)])
    assert batch.input_ids.tolist() == [[21, 22, 0, 0], [11, 12, 13, 14]]
    assert batch.labels.tolist() == [[_, 22, 0, _], [_, _, 13, 14]]


def test_a_batch_counts_its_tokens_and_names_its_records() -> None:
    """By hand: 4 + 3 + 2 tokens, 2 + 2 of them supervised; padding is not counted."""
    batch = collate([A, B, C], [(0, 1), (2,)], loss_weight=0.25, seed=9)
    assert (batch.num_tokens, batch.supervised_tokens) == (9, 4)
    assert batch.record_ids == ["a", "b", "c"]
    assert (batch.loss_weight, batch.seed) == (0.25, 9)
    assert batch.supervised_tokens == (batch.labels != _).sum()


def test_an_empty_micro_batch_is_one_unlabeled_padding_token() -> None:
    """A rank without rows still takes part in the step."""
    batch = collate([A, B, C], [], loss_weight=0.5)
    assert batch.input_ids.tolist() == [[0]]
    assert batch.position_ids.tolist() == [[0]]
    assert batch.labels.tolist() == [[_]]
    assert (batch.num_tokens, batch.supervised_tokens, batch.record_ids) == (0, 0, [])


def test_tensors_are_int64() -> None:
    batch = collate([A], [(0,)])
    assert {batch.input_ids.dtype, batch.position_ids.dtype, batch.labels.dtype} == {torch.int64}


def test_all_tensors_of_a_batch_move_to_a_device() -> None:
    """Uses the meta device, which every machine has."""
    batch = collate([A, B], [(0, 1)], loss_weight=0.25, seed=9)
    moved = batch.to("meta")
    assert {t.device.type for t in (moved.input_ids, moved.position_ids, moved.labels)} == {"meta"}
    assert (moved.record_ids, moved.num_tokens, moved.supervised_tokens, moved.loss_weight, moved.seed) == (
        ["a", "b"],
        7,
        4,
        0.25,
        9,
    )
