"""ClaimsDataModule: from files to loaders, without a model. The base is the small one of conftest: 512 positions."""

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.data.schedule import BatchingConfig, training_schedule
from lit_phi2.errors import InputError
from lit_phi2.types import Batch

WriteJsonl = Callable[..., Path]


@pytest.fixture
def claims(phi_dir: Path, write_jsonl: WriteJsonl) -> Callable[..., ClaimsDataModule]:
    """A datamodule on records; a list of them in place of a path is written to a file first."""

    def make(**options: object) -> ClaimsDataModule:
        for name, value in options.items():
            if name.endswith("_files") and isinstance(value, list):
                options[name] = str(write_jsonl(value, f"{name}.jsonl"))
        return ClaimsDataModule(**{"base": str(phi_dir), "val_files": None, **options})

    return make


Claims = Callable[..., ClaimsDataModule]


def trainer_at(step: int = 0, **settings: object) -> SimpleNamespace:
    """As much of a Trainer as a datamodule looks at."""
    defaults = {"global_rank": 0, "world_size": 1, "limit_train_batches": 1.0, "overfit_batches": 0.0}
    return SimpleNamespace(**{**defaults, "accumulate_grad_batches": 1, "global_step": step, **settings})


def question(number: int, sibling: str = "") -> dict[str, str]:
    return {"id": f"q{number}{sibling}", "instruction": f"Claim {number}?", "response": f"Answer {number}{sibling}."}


def ids_of(data: ClaimsDataModule, use: str) -> list[str]:
    return [example.id for example in data.splits[use].examples]


def record_ids(batches: list[Batch]) -> list[list[str]]:
    return [batch.record_ids for batch in batches]


# Building and setting up


def test_building_reads_nothing() -> None:
    """Neither files nor base exist; a wrong one is told in setup."""
    data = ClaimsDataModule(train_files="/nowhere.jsonl", base="/nowhere")
    with pytest.raises(InputError, match=r"model\.base: '/nowhere'"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_bad_record": "ignore"}, "data.on_bad_record: 'ignore' is unknown; expected 'error' or 'skip'"),
        ({"val_fraction": 0.0}, "data.val_fraction: 0.0 is not between 0 and 1"),
        ({"val_fraction": 1.0}, "data.val_fraction: 1.0 is not between 0 and 1"),
        ({"max_length": 0}, "data.max_length: 0 is less than 1"),
        ({"batch_size": 0}, "data.batch_size: 0 is less than 1"),
    ],
)
def test_a_setting_out_of_range_is_refused_when_building(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ClaimsDataModule(**options)


@pytest.mark.parametrize("files", [[], "", [""]])
def test_no_files_at_all_are_refused_by_name(files: object, phi_dir: Path) -> None:
    data = ClaimsDataModule(train_files=files, base=str(phi_dir))
    with pytest.raises(InputError, match=r"data\.train_files: is empty; expected a path or a list of paths"):
        data.setup("fit")


def test_an_unknown_overlong_is_refused(claims: Claims) -> None:
    with pytest.raises(InputError, match=r"data\.on_overlong: 'cut' is unknown"):
        claims(on_overlong="cut", train_files=[question(n) for n in range(40)]).setup("fit")


def test_examples_longer_than_the_bases_context_are_refused(claims: Claims) -> None:
    """The small base has 512 positions."""
    files = [question(n) for n in range(40)]
    claims(train_files=files, max_length=512).setup("fit")
    with pytest.raises(InputError, match=r"data\.max_length: 513 is more than the 512 positions of base"):
        claims(train_files=files, max_length=513).setup("fit")


def test_a_second_setup_finds_it_done(claims: Claims, tmp_path: Path) -> None:
    """Lightning sets up again; the file is not read twice."""
    data = claims(train_files=[question(n) for n in range(40)])
    data.setup("fit")
    first = data.splits["train"]
    (tmp_path / "train_files.jsonl").unlink()
    data.setup("fit")
    data.setup("validate")
    assert data.splits["train"] is first


@pytest.mark.parametrize(
    ("stage", "uses"),
    [("fit", {"train", "val"}), ("validate", {"val"}), ("test", {"test"}), ("predict", {"predict"})],
)
def test_a_stage_reads_only_the_files_it_uses(stage: str, uses: set[str], claims: Claims) -> None:
    files = {f"{use}_files": [question(n) for n in range(3)] for use in uses}
    absent = {f"{use}_files": "/nowhere.jsonl" for use in {"train", "val", "test", "predict"} - uses}
    data = claims(**files, **absent)
    data.setup(stage)
    assert {use: len(split.examples) for use, split in data.splits.items()} == dict.fromkeys(uses, 3)


# Bad records


def bad_and_good() -> list[object]:
    """Ten lines: two that are no records, one too long for 64 tokens, one that trimming saves, six good ones."""
    too_long = {"id": "long", "instruction": "Why?", "response": "claim denied appeal " * 40}
    saved = {"id": "saved", "instruction": "Why?", "input": "claim denied appeal " * 40, "response": "So."}
    return ["{not json", {"instruction": "Why?"}, too_long, saved, *[question(n) for n in range(6)]]


def test_every_fault_is_told_at_once_parsing_and_length_alike(claims: Claims, tmp_path: Path) -> None:
    data = claims(train_files=bad_and_good(), val_files=[question(0)], max_length=64)
    with pytest.raises(InputError) as raised:
        data.setup("fit")
    path = tmp_path / "train_files.jsonl"
    lines = str(raised.value).splitlines()
    assert [line.split(": ")[0] for line in lines[:3]] == [f"{path}:1", f"{path}:2", f"{path}:3"]
    assert lines[3].startswith("3 bad records in data.train_files.")
    assert len(lines) == 4


def test_skip_leaves_bad_records_out_and_loses_none(claims: Claims, tmp_path: Path) -> None:
    data = claims(train_files=bad_and_good(), val_files=[question(0)], max_length=64, on_bad_record="skip")
    data.setup("fit")
    split = data.splits["train"]
    assert ids_of(data, "train") == [record.id for record in split.records] == ["saved"] + [f"q{n}" for n in range(6)]
    path = tmp_path / "train_files.jsonl"
    assert [fault.location for fault in split.left_out] == [f"{path}:{line}" for line in (1, 2, 3)]
    assert len(split.examples) + len(split.left_out) == len(path.read_text().splitlines()) == 10


def test_skip_with_a_held_out_part_loses_no_record_either(claims: Claims, tmp_path: Path) -> None:
    rows = [*bad_and_good()[:4], *[question(n) for n in range(50)]]
    data = claims(train_files=rows, val_fraction=0.3, max_length=64, on_bad_record="skip")
    data.setup("fit")
    train, val = data.splits["train"], data.splits["val"]
    assert len(train.examples) + len(val.examples) == 51
    places = sorted(int(fault.location.rpartition(":")[2]) for fault in train.left_out + val.left_out)
    assert places == [1, 2, 3]


def test_overlong_skip_leaves_out_without_being_a_bad_record(claims: Claims) -> None:
    """on_bad_record stays error, for what is really wrong."""
    data = claims(train_files=bad_and_good()[2:], val_files=[question(0)], max_length=64, on_overlong="skip")
    data.setup("fit")
    assert ids_of(data, "train") == [f"q{n}" for n in range(6)]
    assert len(data.splits["train"].left_out) == 2


def test_overlong_error_names_each_record_that_is_too_long(claims: Claims, tmp_path: Path) -> None:
    data = claims(train_files=bad_and_good()[2:], val_files=[question(0)], max_length=64, on_overlong="error")
    with pytest.raises(InputError, match=r"2 bad records in data.train_files") as raised:
        data.setup("fit")
    path = tmp_path / "train_files.jsonl"
    assert f"{path}:1: record 'long' " in str(raised.value)
    assert f"{path}:2: record 'saved' " in str(raised.value)


def test_a_file_of_nothing_but_bad_records_is_an_error_even_with_skip(claims: Claims, tmp_path: Path) -> None:
    data = claims(train_files=bad_and_good()[:2], val_files=[question(0)], on_bad_record="skip")
    with pytest.raises(
        InputError, match=r"data\.train_files: none of the 2 records can be used. The first: "
    ) as raised:
        data.setup("fit")
    assert f"{tmp_path / 'train_files.jsonl'}:1: is not valid JSON" in str(raised.value)


# Validation records


def test_records_with_the_same_prompt_stay_together(claims: Claims) -> None:
    """Three answers to each question: none is trained on while its sibling validates."""
    data = claims(train_files=[question(n, s) for n in range(60) for s in "abc"], val_fraction=0.3)
    data.setup("fit")
    train, val = ({name[:-1] for name in ids_of(data, use)} for use in ("train", "val"))
    assert train
    assert val
    assert train & val == set()
    assert len(ids_of(data, "train")) == 3 * len(train)
    assert len(ids_of(data, "val")) == 3 * len(val)


def test_the_split_depends_neither_on_order_nor_on_ids_nor_on_other_records(claims: Claims) -> None:
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
    """Binomial over 1,000 prompts: within four standard deviations. The hash is fixed, so this never flickers."""
    data = claims(train_files=[question(n) for n in range(1000)], val_fraction=fraction)
    data.setup("fit")
    held_out = len(ids_of(data, "val"))
    assert abs(held_out - 1000 * fraction) < 4 * (1000 * fraction * (1 - fraction)) ** 0.5
    assert held_out + len(ids_of(data, "train")) == 1000


def test_validate_alone_holds_out_the_same_records_as_fit(claims: Claims) -> None:
    rows = [question(n) for n in range(100)]
    fit, validate = claims(train_files=rows), claims(train_files=rows)
    fit.setup("fit")
    validate.setup("validate")
    assert ids_of(validate, "val") == ids_of(fit, "val") != []


@pytest.mark.parametrize(("fraction", "part"), [(1e-9, "validation"), (1 - 1e-9, "training")])
def test_a_fraction_that_leaves_a_part_empty_is_refused(fraction: float, part: str, claims: Claims) -> None:
    data = claims(train_files=[question(n) for n in range(5)], val_fraction=fraction)
    with pytest.raises(InputError, match=f"of 5 records leaves none for {part}. Give data.val_files, or another"):
        data.setup("fit")


def test_bad_records_are_told_before_a_fraction_that_leaves_a_part_empty(claims: Claims) -> None:
    """Most of a file is bad, and what is left is too little to hold a part out: the first is the cause."""
    data = claims(train_files=[question(0), {"instruction": "Why?"}, "not json"], val_fraction=1e-9)
    with pytest.raises(InputError, match=r"2 bad records in data\.train_files"):
        data.setup("fit")


def test_given_val_files_are_used_whole_and_training_records_too(claims: Claims) -> None:
    data = claims(train_files=[question(n) for n in range(20)], val_files=[question(n) for n in range(100, 107)])
    data.setup("fit")
    assert ids_of(data, "train") == [f"q{n}" for n in range(20)]
    assert ids_of(data, "val") == [f"q{n}" for n in range(100, 107)]


# Training loader


def batches(data: ClaimsDataModule) -> list[Batch]:
    return list(data.train_dataloader())


@pytest.fixture
def training(claims: Claims, some_records: list[dict[str, str]]) -> ClaimsDataModule:
    """Twelve records, one in a batch, two batches a step: six steps in an epoch."""
    data = claims(train_files=some_records, val_files=some_records, packing=False)
    data.trainer = trainer_at(accumulate_grad_batches=2)
    data.setup("fit")
    assert data.steps_per_epoch() == 6
    return data


def test_the_loader_gives_every_record_once_in_another_order_each_epoch(training: ClaimsDataModule) -> None:
    first = record_ids(batches(training))
    training.trainer.global_step = 6
    second = record_ids(batches(training))
    assert sorted(first) == sorted(second) == sorted([f"r{n}"] for n in range(12))
    assert first != second


@pytest.mark.parametrize("step", [1, 5, 6, 8, 17])
def test_a_loader_starts_where_the_run_stands_when_it_is_iterated(step: int, training: ClaimsDataModule) -> None:
    """Reference: the whole epoch, less two batches for each step taken. The loader is built before that."""
    training.trainer.global_step = step - step % 6
    whole = batches(training)
    training.trainer.global_step = 0
    loader = training.train_dataloader()
    training.trainer.global_step = step
    rest = list(loader)
    expected = whole[2 * (step % 6) :]
    assert len(rest) == len(expected) > 0
    assert [(b.record_ids, b.share, b.seed) for b in rest] == [(b.record_ids, b.share, b.seed) for b in expected]
    assert len(loader) == 12  # Lightning takes the length for that of an epoch


def test_overfitting_repeats_the_same_batches_in_every_epoch(training: ClaimsDataModule) -> None:
    training.trainer = trainer_at(overfit_batches=3, limit_train_batches=3)
    first = record_ids(batches(training))
    training.trainer.global_step = 3
    assert record_ids(batches(training)) == first
    assert len(first) == 3


def test_ranks_share_out_the_records(training: ClaimsDataModule) -> None:
    seen = []
    for rank in range(5):
        training.trainer = trainer_at(world_size=5, global_rank=rank)
        loader = training.train_dataloader()
        assert len(loader) == 3  # 12 records over 5 ranks
        seen += [name for batch in loader for name in batch.record_ids]
    assert sorted(seen) == sorted(f"r{n}" for n in range(12))


def test_packed_batches_hold_several_records_and_no_more_than_max_length(claims: Claims) -> None:
    data = claims(train_files=[question(n) for n in range(40)], max_length=240)
    data.trainer = trainer_at()
    data.setup("fit")
    found = batches(data)
    assert min(len(batch.record_ids) for batch in found) > 1
    assert max(batch.input_ids.shape[1] for batch in found) <= 240
    assert {batch.input_ids.shape[0] for batch in found} == {1}


class Recorder(pl.LightningModule):
    """Learns nothing and remembers the batches that a real Trainer gave it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[Batch] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.seen.append(batch)
        return self.weight.sum() * batch.share

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize(("limit", "batches_per_epoch"), [(1.0, 12), (5, 5), (0.5, 6), (0.6, 7)])
def test_a_real_trainer_runs_what_was_planned_under_any_limit(
    limit: float, batches_per_epoch: int, claims: Claims, some_records: list[dict[str, str]]
) -> None:
    """Lightning cuts a loader by limit_train_batches itself; a fraction must not be taken twice."""
    data = claims(train_files=some_records, val_files=some_records, packing=False)
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
    shape = BatchingConfig(512, packing=False, accumulate=2, limit=batches_per_epoch)
    planned = [m for epoch in (0, 1) for m in training_schedule(lengths, supervised, shape, seed=42, epoch=epoch)]
    assert [(batch.seed, batch.share) for batch in model.seen] == [(micro.seed, micro.share) for micro in planned]
    assert len(planned) == 2 * batches_per_epoch
    assert trainer.global_step == 2 * data.steps_per_epoch()


# Evaluation and prediction


@pytest.mark.parametrize("packing", [True, False])
def test_validation_and_test_see_every_record_once(
    packing: bool, claims: Claims, some_records: list[dict[str, str]]
) -> None:
    data = claims(train_files=some_records, val_files=some_records, test_files=some_records[:5], packing=packing)
    data.setup("fit")
    data.setup("test")
    for loader, count in ((data.val_dataloader(), 12), (data.test_dataloader(), 5)):
        found = list(loader)
        assert sorted(n for batch in found for n in batch.record_ids) == sorted(r["id"] for r in some_records[:count])
        assert len(loader) == len(found)


def test_predict_needs_no_response_and_keeps_one_that_is_given(claims: Claims) -> None:
    rows = [{"instruction": "Why?"}, {"instruction": "How?", "response": "So."}]
    data = claims(predict_files=rows)
    data.setup("predict")
    split = data.splits["predict"]
    assert [record.response for record in split.records] == ["", "So."]
    assert split.supervised.tolist() == [0, 0]
    assert data.tokenizer is not None
    assert data.tokenizer.decode(split.examples[1].ids) == "### Instruction:\nHow?\n\n### Response:\n"


def test_predict_batches_name_every_prompt_by_its_place_in_the_input(claims: Claims) -> None:
    """Prompts are sorted by length to waste little; their indices bring answers back in order."""
    rows = [{"id": str(n), "instruction": "claim denied " * (1 + (n * 37) % 50)} for n in range(75)]
    data = claims(predict_files=rows, max_new_tokens=64)
    data.setup("predict")
    found = list(data.predict_dataloader())
    assert sorted(index for batch in found for index in batch.indices) == list(range(75))
    assert len(found) > 2
    for batch in found:
        for index, prompt in zip(batch.indices, batch.prompts, strict=True):
            assert prompt == data.splits["predict"].examples[index].ids
        assert len(batch.prompts) * (max(map(len, batch.prompts)) + 64) <= 8192  # tokens, answers included


def test_ranks_share_out_the_prompts(claims: Claims) -> None:
    data = claims(predict_files=[{"instruction": f"Claim {n}?"} for n in range(75)])
    data.setup("predict")
    seen = []
    for rank in range(2):
        data.trainer = trainer_at(world_size=2, global_rank=rank)
        seen += [index for batch in data.predict_dataloader() for index in batch.indices]
    assert sorted(seen) == list(range(75))


def test_in_predict_the_limit_is_the_context_less_room_for_the_answer(claims: Claims) -> None:
    """512 positions less 412 new tokens leave 100, whatever data.max_length says."""
    row = {"id": "r", "instruction": "Why?", "input": "claim denied appeal " * 60}
    data = claims(predict_files=[row], max_new_tokens=412, max_length=20)
    data.setup("predict")
    example = data.splits["predict"].examples[0]
    assert example.truncated
    assert 95 < len(example.ids) <= 100
    assert data.tokenizer is not None
    assert data.tokenizer.decode(example.ids).endswith("\n\n### Response:\n")


def test_new_tokens_that_leave_no_room_for_a_prompt_are_refused(claims: Claims) -> None:
    data = claims(predict_files=[question(0)], max_new_tokens=512)
    with pytest.raises(
        InputError, match=r"model\.max_new_tokens: 512 leaves no room for a prompt in the 512 positions"
    ):
        data.setup("predict")


# Identity


@pytest.mark.parametrize("change", ["response", "id", "order", "max_length", "seed"])
def test_a_run_on_other_data_or_another_plan_is_not_the_same_run(
    change: str, claims: Claims, some_records: list[dict[str, str]]
) -> None:
    rows = [dict(record) for record in some_records]
    options: dict[str, object] = {}
    if change in ("response", "id"):
        rows[3][change] += "!"
    elif change == "order":
        rows.reverse()
    else:
        options[change] = 77

    def identity(records: list[dict[str, str]], **options: object) -> dict[str, object]:
        data = claims(train_files=records, val_files=some_records, **options)
        data.trainer = trainer_at()
        data.setup("fit")
        return data.identity()

    assert identity(some_records) == identity(some_records)
    assert identity(rows, **options) != identity(some_records)
