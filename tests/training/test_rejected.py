"""rejected.jsonl: the records that the subcommands of a run leave out now, each with its text."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from forked_runs import start_program
from lit_phi2.cli.main import main
from lit_phi2.data.records import InvalidRecord
from lit_phi2.training.rejected import write_rejected
from lit_phi2.utils.files import read_json_lines

WRITE_20_TIMES = """
import sys
from pathlib import Path
from types import SimpleNamespace
from lit_phi2.data.records import InvalidRecord
from lit_phi2.training.rejected import write_rejected
for number in range(20):
    split = SimpleNamespace(left_out=[InvalidRecord(f"{sys.argv[2]}.jsonl:{number}", "is empty", "{}")])
    write_rejected({sys.argv[2]: split}, Path(sys.argv[1]))
"""


class Split:
    def __init__(self, *left_out: str) -> None:
        self.left_out = [InvalidRecord(f"{text}.jsonl:1", "is empty", text) for text in left_out]


def test_a_run_that_rejects_nothing_removes_its_own_lines(tmp_path: Path) -> None:
    file = tmp_path / "rejected.jsonl"
    write_rejected({"train": Split("a"), "val": Split("b")}, tmp_path)
    write_rejected({"val": Split()}, tmp_path)
    assert [row["split"] for row in read_json_lines(file)] == ["train"]
    write_rejected({"test": Split()}, tmp_path)
    assert [row["split"] for row in read_json_lines(file)] == ["train"]
    write_rejected({"train": Split(), "val": Split()}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_lines_of_other_splits_survive_any_text(tmp_path: Path) -> None:
    """Also texts that hold the characters at which str.splitlines splits."""
    text = '{"response": "one\u2028two\u2029three\x85four\x0b\x0c\x1c\x1d\x1e"}'
    for name in ("train", "val", "test", "val"):
        write_rejected({name: Split(text)}, tmp_path)
    rows = read_json_lines(tmp_path / "rejected.jsonl")
    assert sorted((row["split"], row["record"]) for row in rows) == [("test", text), ("train", text), ("val", text)]


def test_two_commands_of_one_run_lose_no_line_of_the_other(tmp_path: Path) -> None:
    names = ("val", "test", "predict")
    folder = tmp_path / "run"
    folder.mkdir()
    commands = [start_program(WRITE_20_TIMES, [str(folder), name], tmp_path / f"{name}.log") for name in names]
    assert [command.wait() for command in commands] == [0, 0, 0], [command.output for command in commands]
    rows = read_json_lines(folder / "rejected.jsonl")
    assert {row["split"]: row["location"] for row in rows} == {name: f"{name}.jsonl:19" for name in names}
    assert [path.name for path in folder.iterdir()] == ["rejected.jsonl"]


def test_rejected_jsonl_says_what_the_last_predict_left_out(
    phi_dir: Path, record_rows: list[dict[str, str]], write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    broken = '{"id": "x", "instruction": "", "input": "page one\u2028page two"}'
    file = write_jsonl([*record_rows[:2], broken])
    arguments = ["predict", f"--model.base={phi_dir}", "--model.max_new_tokens=2", "--data.on_bad_record=skip"]
    arguments += [f"--data.predict_files={file}", f"--output={tmp_path / 'out' / 'predictions.jsonl'}"]
    arguments += ["--trainer.enable_progress_bar=false"]
    assert main(arguments) == 0
    (row,) = read_json_lines(tmp_path / "out" / "rejected.jsonl")
    assert row["location"].endswith("records.jsonl:3")
    assert json.loads(row["record"]) == json.loads(broken)
    write_jsonl(record_rows[:2])
    assert main(arguments) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["predictions.jsonl"]


@pytest.mark.parametrize("content", ["not JSON\n", "[]\n"])
def test_a_damaged_rejected_jsonl_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "rejected.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"rejected\.jsonl:1: is damaged"):
        write_rejected({"val": Split("a")}, tmp_path)
