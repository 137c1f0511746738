"""The notebook runs from its first cell to its last, in an empty folder and without Jupyter."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers import ROOT

TOUR = ROOT / "scripts" / "tour.ipynb"


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


@pytest.fixture(scope="module")
def notebook() -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads(TOUR.read_text("utf-8"))
    return notebook


def test_the_notebook_has_ten_cells_and_no_stored_output(notebook: dict[str, Any]) -> None:
    """As nbformat 4.5 defines them; outputs would hold texts of records."""
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len(notebook["cells"]) == 10
    assert len({cell["id"] for cell in notebook["cells"]}) == 10
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


def test_the_notebook_trains_draws_curves_and_answers(
    notebook: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(compile(source(cell), f"{TOUR}: {cell['id']}", "exec"), names)
    assert names["trainer"].global_step == 10
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    lines = {line.get_label(): line.get_xydata() for line in names["plt"].gca().get_lines()}
    assert [list(points[:, 0]) for points in lines.values()] == [list(range(1, 11)), [0, 5, 10]]
    losses = lines["val/loss"][:, 1]
    assert losses[-1] < losses[0]
    assert names["answer"]
    printed = capsys.readouterr().out
    assert all(f"Step {step}:" in printed for step in (0, 5, 10))
    best = dict(line.split() for line in printed.splitlines() if line.startswith("val/"))
    assert float(best["val/loss"]) == pytest.approx(min(losses[1:]), rel=1e-4)
    names["plt"].close("all")
