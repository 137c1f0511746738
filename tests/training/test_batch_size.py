"""data.batch_size: auto chooses rows by the memory plan, and the optimizer steps stay what they are."""

import logging
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from helpers import TINY_CONFIG, DieAt, new_data, new_module, new_trainer, relative_difference, weights_of
from lit_phi2.adapters.checkpoint import read_checkpoint
from lit_phi2.cli.main import main
from lit_phi2.errors import InputError
from lit_phi2.training import batch_size
from lit_phi2.training.batch_size import RowsChoice, choose_rows
from lit_phi2.training.memory_plan import plan_fit
from lit_phi2.training.memory_terms import PhiSizes, Workload

Jsonl = Callable[..., Path]

PHI2 = PhiSizes(32, 2560, 32, 80, 10240, 51200, 2048, 32, 0.1)
CARD = Workload(torch.bfloat16, "cuda", 2, ("Wqkv", "fc1", "fc2"), 0.0, False, 1, 512, 512, 512, 256, 64, 1)


@pytest.fixture
def train(write_jsonl: Jsonl, record_rows: list[dict[str, str]]) -> Path:
    return write_jsonl([{**record, "id": f"{record['id']}-{copy}"} for copy in range(5) for record in record_rows])


def run(base: Path, train: Path, folder: Path, rows: int | str, *callbacks: Any, **resume: Any) -> dict[str, Tensor]:
    """Two epochs of steps of four rows of 128 tokens; the weights."""
    module, data = new_module(base), new_data(base, train, batch_size=rows)
    accumulate = 4 if rows == "auto" else 4 // int(rows)
    trainer = new_trainer(folder, callbacks, keep=True, max_epochs=2, accumulate_grad_batches=accumulate)
    trainer.checkpoint_every_n_steps = 1
    trainer.fit(module, data, **resume)
    return weights_of(module)


def test_the_most_rows_that_fit_are_taken() -> None:
    """Reference: the plan of each number of rows; only divisors of the 12 rows of a step count."""
    needed = {rows: plan_fit(PHI2, replace(CARD, rows=rows), 0, 2**40).needed for rows in (1, 2, 3, 4, 6, 12)}
    assert sorted(needed.values()) == list(needed.values())
    for rows, smaller in ((12, 6), (6, 4), (4, 3), (3, 2), (2, 1), (1, 0)):
        assert choose_rows(PHI2, CARD, 12, 0, needed[rows]) == rows
        assert choose_rows(PHI2, CARD, 12, 0, needed[rows] - 1) == smaller


@pytest.mark.parametrize(
    ("device", "length", "rows"), [("cuda", 512, 32), ("cuda", 2048, 8), ("mps", 512, 4), ("cpu", 512, 1)]
)
def test_no_more_rows_than_a_device_needs_are_taken(device: str, length: int, rows: int) -> None:
    """16,384, 2,048 and 512 tokens, however much memory there is."""
    work = replace(CARD, device_type=device, row_length=length, supervised=length)
    assert choose_rows(PHI2, work, 64, 0, 2**60) == rows


def test_chosen_rows_take_the_steps_of_single_rows(
    phi_dir: Path, train: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Reference: one row at a time, where only the order of summation differs. The config has the numbers."""
    monkeypatch.setitem(batch_size.ENOUGH_TOKENS, "cpu", 2 * 128)
    caplog.set_level(logging.INFO, "lit_phi2")
    weights = run(phi_dir, train, tmp_path / "auto", "auto")
    assert "auto takes 2 of the 4 rows of an optimizer step at once, so accumulate_grad_batches is 2" in caplog.text
    for name, weight in run(phi_dir, train, tmp_path / "single", 1).items():
        assert relative_difference(weights[name], weight) < 1e-3, name
    for name, weight in run(phi_dir, train, tmp_path / "two", 2).items():
        assert torch.equal(weights[name], weight), name
    config = yaml.safe_load((tmp_path / "auto" / "run" / "version_0" / "config.yaml").read_text("utf-8"))
    assert (config["data"]["batch_size"], config["trainer"]["accumulate_grad_batches"]) == (2, 2)


def test_a_resumed_run_takes_the_rows_of_its_checkpoint(
    phi_dir: Path, train: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the uninterrupted run, bit for bit, although one row at a time would be chosen by now."""
    monkeypatch.setitem(batch_size.ENOUGH_TOKENS, "cpu", 4 * 128)
    expected = run(phi_dir, train, tmp_path / "whole", "auto")
    with pytest.raises(RuntimeError, match="power cut"):
        run(phi_dir, train, tmp_path / "cut", "auto", DieAt(3))
    last = tmp_path / "cut" / "run" / "version_0" / "checkpoints" / "last.ckpt"
    assert read_checkpoint(last)[1]["lit_phi2"]["run"]["data.batch_size"] == 4
    monkeypatch.setitem(batch_size.ENOUGH_TOKENS, "cpu", 1)
    resumed = run(phi_dir, train, tmp_path / "cut", "auto", ckpt_path=str(last))
    assert all(torch.equal(resumed[name], weight) for name, weight in expected.items())


def test_what_fits_nowhere_is_refused_before_a_folder_is_opened(
    phi_dir: Path, train: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_size, "available_memory", lambda device: 0)
    with pytest.raises(
        InputError, match=r"data.batch_size: auto: one row of 128 tokens needs .* free on cpu is .* Take"
    ):
        run(phi_dir, train, tmp_path / "run", "auto")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["limit_train_batches", "limit_val_batches", "val_check_interval"])
def test_settings_that_count_micro_batches_are_refused_with_auto(
    name: str, phi_dir: Path, train: Path, tmp_path: Path
) -> None:
    trainer = new_trainer(tmp_path, **{name: 3})
    with pytest.raises(InputError, match=rf"trainer.{name}: 3 counts micro-batches"):
        trainer.fit(new_module(phi_dir), new_data(phi_dir, train, batch_size="auto"))


def test_the_command_line_takes_auto_and_keeps_the_numbers(
    claims_phi_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--config", str(TINY_CONFIG), "--model.base", str(claims_phi_dir), "--model.max_new_tokens", "2"]
    common += ["--trainer.default_root_dir", str(tmp_path), "--trainer.accelerator", "cpu"]
    few = ["--data.train_files", "claims:train[:8]", "--data.val_files", "claims:validation[:2]"]
    for value, message in (("many", "'many' is unknown; expected a number of rows, or auto"), ("0", "less than 1")):
        assert main(["fit", *common, *few, "--data.batch_size", value]) == 2
        assert message in capsys.readouterr().err
    assert main(["inspect", *common, *few, "--data.batch_size", "auto"]) == 0
    assert "rows 1 x" in capsys.readouterr().out
    steps = ["--trainer.max_steps", "1", "--trainer.accumulate_grad_batches", "3"]
    assert main(["fit", *common, *few, *steps, "--data.batch_size", "auto"]) == 0
    config = yaml.safe_load((tmp_path / "tiny" / "version_0" / "config.yaml").read_text("utf-8"))
    assert (config["data"]["batch_size"], config["trainer"]["accumulate_grad_batches"]) == (1, 3)


@pytest.mark.parametrize("rows", [(8, 2, 4), (1, 1, 1), (4, 0, 2)])
def test_all_ranks_take_the_smallest_choice(rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks as threads that exchange their choices, as the processes of torchrun do; or all refuse."""
    barrier, given = threading.Barrier(3, timeout=60), [RowsChoice(0, "")] * 3
    monkeypatch.setattr(batch_size, "all_ranks_run", lambda trainer: True)

    def gather(choice: RowsChoice, world_size: int) -> list[RowsChoice]:
        given[int(choice.text.split()[-1])] = choice
        barrier.wait()
        return list(given)

    monkeypatch.setattr(batch_size, "gather_choices", gather)

    def agree(rank: int) -> int | str:
        strategy = SimpleNamespace(setup_environment=lambda: None)
        trainer: Any = SimpleNamespace(is_global_zero=rank == 0, world_size=3, strategy=strategy)
        try:
            return batch_size.agreed_rows(trainer, lambda: RowsChoice(rows[rank], f"rows of rank {rank}"))
        except InputError as error:
            return str(error)

    with ThreadPoolExecutor(3) as ranks:
        agreed = list(ranks.map(agree, range(3)))
    assert agreed == [min(rows) or "data.batch_size: auto: rows of rank 1"] * 3


def test_processes_that_start_later_take_the_choice_of_rank_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the environment that they inherit; what they would choose themselves does not count."""
    monkeypatch.setenv(batch_size.ROWS_VARIABLE, "0")
    monkeypatch.setattr(batch_size, "all_ranks_run", lambda trainer: False)
    trainers: list[Any] = [SimpleNamespace(is_global_zero=rank == 0, world_size=2) for rank in range(2)]
    choices = [RowsChoice(4, "four"), RowsChoice(2, "two")]
    agreed = [
        batch_size.agreed_rows(trainer, lambda choice=choice: choice)
        for trainer, choice in zip(trainers, choices, strict=True)
    ]
    assert agreed == [4, 4]


def test_choices_are_gathered_from_a_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real group, of one."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        assert batch_size.gather_choices(RowsChoice(4, "four"), 1) == [RowsChoice(4, "four")]
    finally:
        torch.distributed.destroy_process_group()
