"""A resumed run says where it cannot be bit for bit the undisturbed one."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers import new_data, new_module, new_trainer


@pytest.fixture
def one_thread() -> Iterator[None]:
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("number", [1, 2])
def test_a_resume_with_another_number_of_threads_warns_once(
    number: int,
    phi_dir: Path,
    train_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    new_trainer(tmp_path, keep=True, max_steps=2).fit(new_module(phi_dir), new_data(phi_dir, train_file))
    torch.set_num_threads(number)
    last = tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt"
    module, data = new_module(phi_dir), new_data(phi_dir, train_file)
    new_trainer(tmp_path, keep=True, max_steps=2).fit(module, data, ckpt_path=str(last))
    warnings = [record.message for record in caplog.records if "num_threads" in record.message]
    expected = "num_threads 1 in the checkpoint, 2 now: the run continues, but not bit for bit; OMP_NUM_THREADS=1 would"
    assert warnings == ([] if number == 1 else [expected])
