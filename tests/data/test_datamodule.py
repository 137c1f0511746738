"""ClaimsDataModule: from files to loaders, without a model. The base of conftest.py has 512 positions."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor

from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.data.schedule import BatchingConfig, training_schedule
from lit_phi2.errors import InputError
from lit_phi2.types import Batch

Claims = Callable[..., ClaimsDataModule]


def trainer_at(step: int = 0, **settings: object) -> SimpleNamespace:
    """The attributes of a Trainer that a data module uses."""
    defaults = {"global_rank": 0, "world_size": 1, "limit_train_batches": 1.0, "overfit_batches": 0.0}
    defaults |= {"default_root_dir": "runs"}
    return SimpleNamespace(**{**defaults, "accumulate_grad_batches": 1, "global_step": step, **settings})


def question(number: int, sibling: str = "") -> dict[str, str]:
    return {"id": f"q{number}{sibling}", "instruction": f"Claim {number}?", "response": f"Answer {number}{sibling}."}


def ids_of(data: ClaimsDataModule, split_name: str) -> list[str]:
    return [example.id for example in data.splits[split_name].examples]


def record_ids(batches: list[Batch]) -> list[list[str]]:
    return [batch.record_ids for batch in batches]


# Settings and setup


def test_construction_reads_nothing() -> None:
    """Neither files nor base exist; setup reports that."""
    data = ClaimsDataModule(train_files="/nowhere.jsonl", base="/nowhere")
    with pytest.raises(InputError, match=r"model\.base: '/nowhere'"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_bad_record": "ignore"}, "data.on_bad_record: 'ignore' is unknown; expected 'error' or 'skip'"),
        ({"val_fraction": 0.0}, "data.val_fraction: 0.0 is not between 0 and 1"),
        ({"val_fraction": 1.0}, "data.val_fraction: 1.0 is not between 0 and 1"),
        ({"turns": "all"}, "data.turns: 'all' is unknown; expected 'error', 'first' or 'last'"),
        ({"encoding": "latin-9000"}, "data.encoding: 'latin-9000' is unknown; expected one such as 'cp1252'"),
        ({"encoding": "base64"}, "data.encoding: 'base64' is unknown"),
        ({"on_overlong": "cut"}, "data.on_overlong: 'cut' is unknown; expected 'truncate', 'skip' or 'error'"),
        ({"max_length": 0}, "data.max_length: 0 is less than 1"),
        ({"batch_size": 0}, "data.batch_size: 0 is less than 1"),
    ],
)
def test_a_setting_out_of_range_is_refused_at_construction(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ClaimsDataModule(**options)


@pytest.mark.parametrize("files", [[], "", [""]])
def test_an_empty_list_of_files_is_refused_by_key(files: object, phi_dir: Path) -> None:
    data = ClaimsDataModule(train_files=files, base=str(phi_dir))
    with pytest.raises(InputError, match=r"data\.train_files: is empty; expected a path or a list of paths"):
        data.setup("fit")


def test_an_unknown_on_overlong_is_refused(claims: Claims) -> None:
    with pytest.raises(InputError, match=r"data\.on_overlong: 'cut' is unknown"):
        claims(on_overlong="cut", train_files=[question(n) for n in range(40)]).setup("fit")


def test_max_length_above_the_context_of_the_base_is_refused(claims: Claims) -> None:
    """The base has 512 positions."""
    files = [question(n) for n in range(40)]
    claims(train_files=files, max_length=512).setup("fit")
    with pytest.raises(InputError, match=r"data\.max_length: 513 is more than the 512 positions of base"):
        claims(train_files=files, max_length=513).setup("fit")


def test_a_second_setup_reads_no_file_again(claims: Claims, tmp_path: Path) -> None:
    """Lightning calls setup more than once; the file is deleted in between."""
    data = claims(train_files=[question(n) for n in range(40)])
    data.setup("fit")
    first = data.splits["train"]
    (tmp_path / "train_files.jsonl").unlink()
    data.setup("fit")
    data.setup("validate")
    assert data.splits["train"] is first


@pytest.mark.parametrize(
    ("stage", "names"),
    [("fit", {"train", "val"}), ("validate", {"val"}), ("test", {"test"}), ("predict", {"predict"})],
)
def test_a_stage_reads_only_the_files_it_uses(stage: str, names: set[str], claims: Claims) -> None:
    files = {f"{name}_files": [question(n) for n in range(3)] for name in names}
    absent = {f"{name}_files": "/nowhere.jsonl" for name in {"train", "val", "test", "predict"} - names}
    data = claims(**files, **absent)
    data.setup(stage)
    assert {name: len(split.examples) for name, split in data.splits.items()} == dict.fromkeys(names, 3)


# Invalid records


def mixed_rows() -> list[object]:
    """Ten lines: two invalid, one too long for 64 tokens, one that truncation can fit, six that fit."""
    too_long = {"id": "long", "instruction": "Why?", "response": "claim denied appeal " * 40}
    truncatable = {"id": "truncatable", "instruction": "Why?", "input": "claim denied appeal " * 40, "response": "So."}
    return ["{not json", {"instruction": "Why?"}, too_long, truncatable, *[question(n) for n in range(6)]]


def test_all_invalid_records_are_reported_at_once(claims: Claims, tmp_path: Path) -> None:
    data = claims(train_files=mixed_rows(), val_files=[question(0)], max_length=64)
    with pytest.raises(InputError) as raised:
        data.setup("fit")
    path = tmp_path / "train_files.jsonl"
    lines = str(raised.value).splitlines()
    assert [line.split(": ")[0] for line in lines[:3]] == [f"{path}:1", f"{path}:2", f"{path}:3"]
    assert lines[3].startswith("3 invalid records in data.train_files.")
    assert len(lines) == 4


def test_skip_leaves_out_invalid_records_and_no_others(claims: Claims, tmp_path: Path) -> None:
    data = claims(train_files=mixed_rows(), val_files=[question(0)], max_length=64, on_bad_record="skip")
    data.setup("fit")
    split = data.splits["train"]
    assert (
        ids_of(data, "train")
        == [record.id for record in split.records]
        == ["truncatable"] + [f"q{n}" for n in range(6)]
    )
    path = tmp_path / "train_files.jsonl"
    assert [record.location for record in split.left_out] == [f"{path}:{line}" for line in (1, 2, 3)]
    assert len(split.examples) + len(split.left_out) == len(path.read_text().splitlines()) == 10


def test_skip_with_val_fraction_loses_no_record(claims: Claims, tmp_path: Path) -> None:
    rows = [*mixed_rows()[:4], *[question(n) for n in range(50)]]
    data = claims(train_files=rows, val_fraction=0.3, max_length=64, on_bad_record="skip")
    data.setup("fit")
    train, val = data.splits["train"], data.splits["val"]
    assert len(train.examples) + len(val.examples) == 51
    lines = sorted(int(record.location.rpartition(":")[2]) for record in train.left_out + val.left_out)
    assert lines == [1, 2, 3]


def test_on_overlong_skip_does_not_make_a_record_invalid(claims: Claims) -> None:
    """With on_bad_record at its default, error."""
    data = claims(train_files=mixed_rows()[2:], val_files=[question(0)], max_length=64, on_overlong="skip")
    data.setup("fit")
    assert ids_of(data, "train") == [f"q{n}" for n in range(6)]
    assert len(data.splits["train"].left_out) == 2


def test_on_overlong_error_names_each_overlong_record(claims: Claims, tmp_path: Path) -> None:
    data = claims(train_files=mixed_rows()[2:], val_files=[question(0)], max_length=64, on_overlong="error")
    with pytest.raises(InputError, match=r"2 invalid records in data.train_files") as raised:
        data.setup("fit")
    path = tmp_path / "train_files.jsonl"
    assert f"{path}:1: has a response of 122 tokens" in str(raised.value)
    assert f"{path}:2: has 1" in str(raised.value)


def test_a_file_without_valid_records_is_an_error_with_skip(claims: Claims, tmp_path: Path) -> None:
    data = claims(train_files=mixed_rows()[:2], val_files=[question(0)], on_bad_record="skip")
    with pytest.raises(
        InputError, match=r"data\.train_files: none of the 2 records can be used. The first: "
    ) as raised:
        data.setup("fit")
    assert f"{tmp_path / 'train_files.jsonl'}:1: is not valid JSON" in str(raised.value)


# Validation records


def test_records_with_the_same_prompt_stay_together(claims: Claims) -> None:
    """Each question has three responses, which are all in train or all in val."""
    data = claims(train_files=[question(n, s) for n in range(60) for s in "abc"], val_fraction=0.3)
    data.setup("fit")
    train, val = ({name[:-1] for name in ids_of(data, split_name)} for split_name in ("train", "val"))
    assert train
    assert val
    assert train & val == set()
    assert len(ids_of(data, "train")) == 3 * len(train)
    assert len(ids_of(data, "val")) == 3 * len(val)


def test_the_hold_out_depends_on_the_prompt_alone(claims: Claims) -> None:
    rows = [question(n) for n in range(200)]
    whole = claims(train_files=rows, val_fraction=0.2)
    whole.setup("fit")
    shuffled = [{**row, "id": f"other {row['id']}"} for row in rows[::2]]
    random.Random(1).shuffle(shuffled)
    half = claims(train_files=shuffled, val_fraction=0.2, seed=7)
    half.setup("fit")
    expected = {f"other {name}" for name in ids_of(whole, "val")} & {row["id"] for row in shuffled}
    assert len(expected) > 5
    assert set(ids_of(half, "val")) == expected


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_val_fraction_of_the_prompts_is_held_out(fraction: float, claims: Claims) -> None:
    """Binomial over 1,000 prompts: within four standard deviations. The hash is fixed, so the test is deterministic."""
    data = claims(train_files=[question(n) for n in range(1000)], val_fraction=fraction)
    data.setup("fit")
    held_out = len(ids_of(data, "val"))
    assert abs(held_out - 1000 * fraction) < 4 * (1000 * fraction * (1 - fraction)) ** 0.5
    assert held_out + len(ids_of(data, "train")) == 1000


def test_validate_holds_out_the_same_records_as_fit(claims: Claims) -> None:
    rows = [question(n) for n in range(100)]
    fit, validate = claims(train_files=rows), claims(train_files=rows)
    fit.setup("fit")
    validate.setup("validate")
    assert ids_of(validate, "val") == ids_of(fit, "val") != []


@pytest.mark.parametrize(("fraction", "part"), [(1e-9, "validation"), (1 - 1e-9, "training")])
def test_a_val_fraction_that_leaves_a_part_empty_is_refused(fraction: float, part: str, claims: Claims) -> None:
    data = claims(train_files=[question(n) for n in range(5)], val_fraction=fraction)
    with pytest.raises(InputError, match=f"of 5 records leaves none for {part}. Give data.val_files, or another"):
        data.setup("fit")


def test_invalid_records_are_reported_before_an_empty_part(claims: Claims) -> None:
    """The invalid records are the reason why too few records remain for a hold-out."""
    data = claims(train_files=[question(0), {"instruction": "Why?"}, "not json"], val_fraction=1e-9)
    with pytest.raises(InputError, match=r"2 invalid records in data\.train_files"):
        data.setup("fit")


def test_with_val_files_all_records_of_both_are_used(claims: Claims) -> None:
    data = claims(train_files=[question(n) for n in range(20)], val_files=[question(n) for n in range(100, 107)])
    data.setup("fit")
    assert ids_of(data, "train") == [f"q{n}" for n in range(20)]
    assert ids_of(data, "val") == [f"q{n}" for n in range(100, 107)]


# Train loader


def batches(data: ClaimsDataModule) -> list[Batch]:
    return list(data.train_dataloader())


@pytest.fixture
def training(claims: Claims, record_rows: list[dict[str, str]]) -> ClaimsDataModule:
    """Twelve records, one per batch, two batches per step: six steps in an epoch."""
    data = claims(train_files=record_rows, val_files=record_rows, packing=False)
    data.trainer = trainer_at(accumulate_grad_batches=2)
    data.setup("fit")
    assert data.steps_per_epoch() == 6
    return data


def test_each_epoch_has_every_record_once_in_another_order(training: ClaimsDataModule) -> None:
    first = record_ids(batches(training))
    training.trainer.global_step = 6
    second = record_ids(batches(training))
    assert sorted(first) == sorted(second) == sorted([f"r{n}"] for n in range(12))
    assert first != second


@pytest.mark.parametrize("step", [1, 5, 6, 8, 17])
def test_a_loader_starts_at_the_current_step_when_iterated(step: int, training: ClaimsDataModule) -> None:
    """Reference: the whole epoch without two batches per step taken. The loader is built at step 0."""
    training.trainer.global_step = step - step % 6
    whole = batches(training)
    training.trainer.global_step = 0
    loader = training.train_dataloader()
    training.trainer.global_step = step
    rest = list(loader)
    expected = whole[2 * (step % 6) :]
    assert len(rest) == len(expected) > 0
    assert [(b.record_ids, b.loss_weight, b.seed) for b in rest] == [
        (b.record_ids, b.loss_weight, b.seed) for b in expected
    ]
    assert len(loader) == 12  # Lightning takes this as the length of an epoch


def test_overfit_batches_repeats_the_same_batches(training: ClaimsDataModule) -> None:
    training.trainer = trainer_at(overfit_batches=3, limit_train_batches=3)
    first = record_ids(batches(training))
    training.trainer.global_step = 3
    assert record_ids(batches(training)) == first
    assert len(first) == 3


def test_ranks_divide_the_records(training: ClaimsDataModule) -> None:
    seen = []
    for rank in range(5):
        training.trainer = trainer_at(world_size=5, global_rank=rank)
        loader = training.train_dataloader()
        assert len(loader) == 3  # 12 records over 5 ranks
        seen += [name for batch in loader for name in batch.record_ids]
    assert sorted(seen) == sorted(f"r{n}" for n in range(12))


def test_a_packed_row_has_several_records_within_max_length(claims: Claims) -> None:
    data = claims(train_files=[question(n) for n in range(40)], max_length=240)
    data.trainer = trainer_at()
    data.setup("fit")
    packed = batches(data)
    assert min(len(batch.record_ids) for batch in packed) > 1
    assert max(batch.input_ids.shape[1] for batch in packed) <= 240
    assert {batch.input_ids.shape[0] for batch in packed} == {1}


class Recorder(pl.LightningModule):
    """Records the batches that a real Trainer passes to it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[Batch] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.seen.append(batch)
        return self.weight.sum() * batch.loss_weight

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize(("limit", "batches_per_epoch"), [(1.0, 12), (5, 5), (0.5, 6), (0.6, 7)])
def test_a_real_trainer_runs_the_schedule_under_any_limit(
    limit: float, batches_per_epoch: int, claims: Claims, record_rows: list[dict[str, str]]
) -> None:
    """Lightning itself limits a loader by limit_train_batches; a fraction must not be applied twice."""
    data = claims(train_files=record_rows, val_files=record_rows, packing=False)
    model = Recorder()
    trainer = pl.Trainer(
        max_epochs=2,
        limit_train_batches=limit,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(model, datamodule=data)
    lengths, supervised = data.splits["train"].lengths, data.splits["train"].supervised
    config = BatchingConfig(512, packing=False, accumulate=2, limit=batches_per_epoch)
    scheduled = [m for epoch in (0, 1) for m in training_schedule(lengths, supervised, config, seed=42, epoch=epoch)]
    assert [(batch.seed, batch.loss_weight) for batch in model.seen] == [(m.seed, m.loss_weight) for m in scheduled]
    assert len(scheduled) == 2 * batches_per_epoch
    assert trainer.global_step == 2 * data.steps_per_epoch()


# Evaluation and predict


@pytest.mark.parametrize("packing", [True, False])
def test_validation_and_test_see_every_record_once(
    packing: bool, claims: Claims, record_rows: list[dict[str, str]]
) -> None:
    data = claims(train_files=record_rows, val_files=record_rows, test_files=record_rows[:5], packing=packing)
    data.setup("fit")
    data.setup("test")
    for loader, count in ((data.val_dataloader(), 12), (data.test_dataloader(), 5)):
        seen = list(loader)
        assert sorted(n for batch in seen for n in batch.record_ids) == sorted(r["id"] for r in record_rows[:count])
        assert len(loader) == len(seen)


def test_predict_needs_no_response_and_keeps_a_given_one(claims: Claims) -> None:
    rows = [{"instruction": "Why?"}, {"instruction": "How?", "response": "So."}]
    data = claims(predict_files=rows)
    data.setup("predict")
    split = data.splits["predict"]
    assert [record.response for record in split.records] == ["", "So."]
    assert split.supervised.tolist() == [0, 0]
    assert data.tokenizer is not None
    assert data.tokenizer.decode(split.examples[1].ids) == "### Instruction:\nHow?\n\n### Response:\n"


def test_predict_batches_index_every_prompt(claims: Claims) -> None:
    """Prompts are in the order of completion; the indices restore that of the input."""
    rows = [{"id": str(n), "instruction": "claim denied " * (1 + (n * 37) % 50)} for n in range(75)]
    data = claims(predict_files=rows, max_new_tokens=64)
    data.setup("predict")
    prompt_batches = list(data.predict_dataloader())
    assert [len(batch.indices) for batch in prompt_batches] == [32, 32, 11]
    assert sorted(index for batch in prompt_batches for index in batch.indices) == list(range(75))
    for batch in prompt_batches:
        for index, prompt in zip(batch.indices, batch.prompts, strict=True):
            assert prompt == data.splits["predict"].examples[index].ids


def test_completed_prompts_are_left_out(claims: Claims) -> None:
    data = claims(predict_files=[{"instruction": f"Claim {n}?"} for n in range(75)])
    data.setup("predict")
    data.completed = np.array([3, 70, 3, 0])
    indices = [index for batch in data.predict_dataloader() for index in batch.indices]
    assert sorted(indices) == sorted({*range(75)} - {0, 3, 70})


def test_ranks_divide_the_prompts(claims: Claims) -> None:
    data = claims(predict_files=[{"instruction": f"Claim {n}?"} for n in range(75)])
    data.setup("predict")
    seen = []
    for rank in range(2):
        data.trainer = trainer_at(world_size=2, global_rank=rank)
        seen += [index for batch in data.predict_dataloader() for index in batch.indices]
    assert sorted(seen) == list(range(75))


def test_predict_limits_a_prompt_to_context_minus_new_tokens(claims: Claims) -> None:
    """512 positions minus 412 new tokens are 100, whatever data.max_length is."""
    row = {"id": "r", "instruction": "Why?", "input": "claim denied appeal " * 60}
    data = claims(predict_files=[row], max_new_tokens=412, max_length=20)
    data.setup("predict")
    example = data.splits["predict"].examples[0]
    assert example.truncated
    assert 95 < len(example.ids) <= 100
    assert data.tokenizer is not None
    assert data.tokenizer.decode(example.ids).endswith("\n\n### Response:\n")


@pytest.mark.parametrize(("split_name", "stage"), [("val", "fit"), ("test", "test")])
def test_a_prompt_without_space_for_completions_is_named(
    split_name: str, stage: str, claims: Claims, tmp_path: Path
) -> None:
    """512 positions; the prompt of line 2 has 100 tokens or more. Only counted prompts are checked."""
    rows = [question(0), {**question(1), "input": "claim denied appeal " * 40}]
    data = claims(train_files=[question(n) for n in range(9)], **{f"{split_name}_files": rows}, max_new_tokens=440)
    data.setup(stage)
    data.check_context_length(split_name, 1)
    with pytest.raises(
        InputError, match=r"model\.max_new_tokens: 440 after the \d+ tokens of the prompt at "
    ) as raised:
        data.check_context_length(split_name)
    assert f"{tmp_path / split_name}_files.jsonl:2 is more than the 512 positions" in str(raised.value)
    assert ("--max_completions" in str(raised.value)) == (split_name == "test")


def test_turns_and_encoding_reach_the_reader(claims: Claims, tmp_path: Path) -> None:
    """A conversation of two exchanges in Windows' encoding for Western Europe; é is byte 0xe9 there."""
    messages = [{"role": r, "content": f"{r} {n} é"} for n in (1, 2) for r in ("user", "assistant")]
    file = tmp_path / "chat.jsonl"
    file.write_bytes(json.dumps({"messages": messages}, ensure_ascii=False).encode("cp1252"))
    data = claims(predict_files=str(file), turns="last", encoding="cp1252")
    data.setup("predict")
    (record,) = data.splits["predict"].records
    assert (record.instruction, record.response) == ("user 2 é", "assistant 2 é")
    assert data.splits["predict"].forms == {str(file): "messages"}


def test_more_ranks_than_prompts_leaves_a_rank_without(claims: Claims) -> None:
    data = claims(predict_files=[question(0)])
    data.setup("predict")
    loaders = []
    for rank in range(3):
        data.trainer = trainer_at(world_size=3, global_rank=rank)
        loaders.append(data.predict_dataloader())
    assert [len(loader) for loader in loaders] == [len(list(loader)) for loader in loaders] == [1, 0, 0]


def test_max_new_tokens_without_space_for_a_prompt_is_refused(claims: Claims) -> None:
    data = claims(predict_files=[question(0)], max_new_tokens=512)
    with pytest.raises(
        InputError, match=r"model\.max_new_tokens: 512 leaves no tokens for a prompt; base .* has 512 positions"
    ):
        data.setup("predict")


# Fingerprint


@pytest.mark.parametrize("change", [("response", "Another."), ("id", "r30"), ("instruction", "Which plan?")])
def test_the_fingerprint_changes_with_the_validation_data(
    change: tuple[str, str], claims: Claims, record_rows: list[dict[str, str]]
) -> None:
    """The training data are the same, so that val_data_digest alone tells the two apart."""
    fingerprints = []
    for rows in (record_rows, record_rows, [*record_rows[:3], {**record_rows[3], change[0]: change[1]}]):
        data = claims(train_files=[question(n) for n in range(20)], val_files=rows)
        data.trainer = trainer_at()
        data.setup("fit")
        fingerprints.append(data.fingerprint())
    first, same, other = fingerprints
    assert first == same
    assert {key for key in first if first[key] != other[key]} == {"val_data_digest"}


@pytest.mark.parametrize("change", ["response", "id", "order", "max_length", "seed"])
def test_the_fingerprint_changes_with_data_and_settings(
    change: str, claims: Claims, record_rows: list[dict[str, str]]
) -> None:
    rows = [dict(record) for record in record_rows]
    options: dict[str, object] = {}
    if change in ("response", "id"):
        rows[3][change] += "!"
    elif change == "order":
        rows.reverse()
    else:
        options[change] = 77

    def fingerprint(records: list[dict[str, str]], **options: object) -> dict[str, object]:
        data = claims(train_files=records, val_files=record_rows, **options)
        data.trainer = trainer_at()
        data.setup("fit")
        return data.fingerprint()

    assert fingerprint(record_rows) == fingerprint(record_rows)
    assert fingerprint(rows, **options) != fingerprint(record_rows)
