"""Where runs live and what a checkpoint's name means."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lit_phi2.errors import InputError
from lit_phi2.utils.paths import create_run_dir, find_checkpoint, run_dir_of


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_runs_opened_at_once_get_folders_of_their_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: create_run_dir(tmp_path, "tiny"), range(40)))
    assert sorted(folder.name for folder in folders) == sorted(f"version_{number}" for number in range(40))


def test_last_and_best_are_those_of_the_newest_run(tmp_path: Path) -> None:
    for version in (9, 10):  # 10 is newer than 9, though not by the alphabet
        put(tmp_path / "tiny" / f"version_{version}" / "checkpoints" / "last.ckpt")
    put(tmp_path / "tiny" / "version_9" / "checkpoints" / "best.ckpt")
    assert find_checkpoint("last", tmp_path, "tiny").parent.parent.name == "version_10"
    with pytest.raises(InputError, match=r"the newest run, .*version_10, has no best\.ckpt"):
        find_checkpoint("best", tmp_path, "tiny")  # that of an older run would be another run's, unasked
    assert create_run_dir(tmp_path, "tiny").name == "version_11"


def test_a_checkpoint_is_a_file_an_adapter_or_the_best_of_a_run(tmp_path: Path) -> None:
    run = tmp_path / "tiny" / "version_0"
    last, best = put(run / "checkpoints" / "last.ckpt"), put(run / "checkpoints" / "best.ckpt")
    put(run / "config.yaml")
    adapter = put(run / "adapter" / "adapter_config.json").parent
    assert find_checkpoint(str(last), tmp_path, "x") == last
    assert find_checkpoint(str(run), tmp_path, "x") == best
    assert find_checkpoint(str(run), tmp_path, "x", prefer="last") == last, "fit continues where it stopped"
    assert find_checkpoint(str(adapter), tmp_path, "x") == adapter
    assert run_dir_of(last) == run_dir_of(adapter) == run
    elsewhere = put(tmp_path / "elsewhere" / "mine" / "adapter_config.json").parent
    assert run_dir_of(elsewhere) == elsewhere


@pytest.mark.parametrize(
    ("name", "told"),
    [("best", "no run of 'tiny'"), ("nowhere.ckpt", "does not exist"), (".", "holds none")],
)
def test_a_checkpoint_that_is_not_there_is_told_with_what_was_expected(
    name: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=told):
        find_checkpoint(name, tmp_path, "tiny")
