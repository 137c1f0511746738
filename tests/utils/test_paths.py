"""Folders of runs, and the checkpoint that a name refers to."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lit_phi2.errors import InputError
from lit_phi2.utils.paths import create_run_dir, expand_user, find_checkpoint, run_dir_of


def create(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_runs_started_at_once_get_different_folders(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: create_run_dir(tmp_path, "tiny"), range(40)))
    assert sorted(folder.name for folder in folders) == sorted(f"version_{number}" for number in range(40))


def test_last_and_best_are_those_of_the_newest_run(tmp_path: Path) -> None:
    for version in (9, 10):  # 10 is newer than 9, but sorts before it as text
        create(tmp_path / "tiny" / f"version_{version}" / "checkpoints" / "last.ckpt")
    create(tmp_path / "tiny" / "version_9" / "checkpoints" / "best.ckpt")
    assert find_checkpoint("last", tmp_path, "tiny").parent.parent.name == "version_10"
    with pytest.raises(InputError, match=r"the newest run, .*version_10, has no best\.ckpt"):
        find_checkpoint("best", tmp_path, "tiny")  # never silently the checkpoint of an older run
    assert create_run_dir(tmp_path, "tiny").name == "version_11"


def test_a_checkpoint_is_a_file_an_adapter_or_a_run(tmp_path: Path) -> None:
    run = tmp_path / "tiny" / "version_0"
    last, best = create(run / "checkpoints" / "last.ckpt"), create(run / "checkpoints" / "best.ckpt")
    create(run / "config.yaml")
    adapter = create(run / "adapter" / "adapter_config.json").parent
    assert find_checkpoint(str(last), tmp_path, "x") == last
    assert find_checkpoint(str(run), tmp_path, "x") == best
    assert find_checkpoint(str(run), tmp_path, "x", prefer="last") == last, "fit continues from the last"
    assert find_checkpoint(str(adapter), tmp_path, "x") == adapter
    assert run_dir_of(last) == run_dir_of(adapter) == run
    elsewhere = create(tmp_path / "elsewhere" / "mine" / "adapter_config.json").parent
    assert run_dir_of(elsewhere) == elsewhere


def test_a_tilde_is_the_home_of_a_user_that_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    assert expand_user("~/a/~b", "--output") == Path("/home/me/a/~b")
    assert expand_user("./~b/a", "--output") == Path.cwd() / "~b" / "a", "as the message advises"
    with pytest.raises(InputError, match=r"^--output: '~no_such_user/a' begins with .* give \./~no_such_user/a$"):
        expand_user("~no_such_user/a", "--output")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("best", "no run of 'tiny'"),
        ("nowhere.ckpt", "does not exist; expected a .ckpt"),
        (".", "contains no checkpoint; expected a .ckpt"),
    ],
)
def test_a_missing_checkpoint_is_an_error_with_the_reason(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        find_checkpoint(name, tmp_path, "tiny")


def test_paths_import_neither_torch_nor_transformers() -> None:
    """A script that only looks for a checkpoint starts in milliseconds, not in seconds."""
    program = "import lit_phi2.utils.paths, sys; print(*sys.modules)"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    packages = {name.partition(".")[0] for name in process.stdout.split()}
    assert "lit_phi2" in packages
    assert not packages & {"torch", "transformers", "lightning", "peft"}
