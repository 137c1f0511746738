"""Fixtures of the audits' tests: twelve records, and the folder of a whole run, which a test may change."""

import shutil
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch  # noqa: F401  before scikit-learn: typing would reuse its float | int, and 2 would be 2.0
import pytest
import yaml

from lit_phi2.cli.main import main
from lit_phi2.data.sources import CLAIMS_DIR

RUN = Path("runs", "run", "version_0")


@pytest.fixture
def train_file(write_jsonl: Callable[..., Path], record_rows: list[dict[str, str]]) -> Path:
    """Twelve records."""
    return write_jsonl(list(record_rows))


@pytest.fixture(scope="session")
def trained(phi_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder members/ with base/, claims.jsonl and RUN, to which the run's config has relative paths."""
    folder = tmp_path_factory.mktemp("members")
    shutil.copytree(phi_dir, folder / "base")
    lines = (CLAIMS_DIR / "train.jsonl").read_text("utf-8").splitlines(keepends=True)
    (folder / "claims.jsonl").write_text("".join(sorted(lines, key=len)[:16]), "utf-8")
    settings = {
        "run_name": "run",
        "model": {"base": "base", "max_new_tokens": 4, "dtype": "float32"},
        "data": {"train_files": "claims.jsonl", "val_files": None, "val_fraction": 0.3, "packing": False},
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "--config", "run.yaml"]) == 0
    return folder


@pytest.fixture
def small_setup(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `trained`, which is the current folder; a test may change it."""
    folder = tmp_path / "members"
    shutil.copytree(trained, folder)
    monkeypatch.chdir(folder)
    return folder
