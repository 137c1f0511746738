"""inspect's report: files with their forms, records that were left out by cause, and no text but the example's."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.data.summary import report

Claims = Callable[..., ClaimsDataModule]
WriteJsonl = Callable[..., Path]


@pytest.fixture
def inspect(claims: Claims, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The report about files in tmp_path, which are named without a folder."""
    monkeypatch.chdir(tmp_path)

    def run(train_files: str | list[str], val_files: str | None = None, **options: object) -> str:
        data = claims(val_files=val_files, **options)
        data.files["train"] = train_files
        return report(data, data.read("fit"))

    return run


def row(number: int) -> dict[str, str]:
    return {"id": f"ID-{number}", "instruction": f"SECRET claim {number}?", "response": "So. " * (1 + number % 7)}


def test_each_file_is_listed_with_its_form(inspect: Callable[..., str], write_jsonl: WriteJsonl) -> None:
    write_jsonl([row(n) for n in range(5)], "a.jsonl")
    write_jsonl([{"prompt": f"Claim {n}?", "completion": "So."} for n in range(5)], "b.jsonl")
    write_jsonl([row(n) for n in range(50, 53)], "v.jsonl")
    printed = inspect(train_files=["a.jsonl", "b.jsonl"], val_files="v.jsonl").splitlines()
    assert printed[:3] == ["train  2 files", "  a.jsonl (instruction)", "  b.jsonl (prompt/completion)"]
    assert "val  v.jsonl (instruction)" in printed


def test_of_many_files_ten_are_listed(inspect: Callable[..., str], write_jsonl: WriteJsonl) -> None:
    names = [f"{n:02d}.jsonl" for n in range(12)]
    for n, name in enumerate(names):
        write_jsonl([{**row(n), "id": f"{n}"}, {**row(n + 20), "id": f"{n + 20}"}], name)
    printed = inspect(train_files=names, val_files="00.jsonl").splitlines()
    assert printed[:12] == ["train  12 files", *[f"  {name} (instruction)" for name in names[:10]], "  ... and 2 more"]


def test_records_left_out_are_grouped_and_nothing_is_quoted(
    inspect: Callable[..., str], write_jsonl: WriteJsonl
) -> None:
    """30 records share a fault. The one example at the end shows its text."""
    write_jsonl([row(n) for n in range(60)] + [{**row(n), "response": ""} for n in range(60, 90)], "a.jsonl")
    printed = inspect(train_files="a.jsonl", on_bad_record="skip")
    report, _, example = printed.partition("The first example")
    left_out = [line for line in report.splitlines() if "left out:" in line]
    assert len(left_out) == 1
    assert left_out[0].startswith("  left out: 30 records, the first at a.jsonl:61, a.jsonl:62 and a.jsonl:63: ")
    assert "SECRET" not in report
    assert "ID-" not in report
    assert "SECRET" in example
    longest = next(line for line in report.splitlines() if line.startswith("  longest "))
    lengths = [len(row(n)["response"]) for n in range(60)]
    assert longest.split("at a.jsonl:")[1].split(";")[0] in {
        str(n + 1) for n in range(60) if lengths[n] == max(lengths)
    }


def test_warnings_are_part_of_the_report(inspect: Callable[..., str], write_jsonl: WriteJsonl) -> None:
    write_jsonl([row(n) for n in range(5)], "a.jsonl")
    printed = inspect(train_files="a.jsonl", val_files="./a.jsonl")
    assert "warning: data.val_files shares with data.train_files: 1 of its 1 files (./a.jsonl), 5 of its 5" in printed


def test_small_files_leave_no_cache(inspect: Callable[..., str], write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    write_jsonl([json.dumps(row(n)) for n in range(50)], "a.jsonl")
    assert f"caches  {tmp_path}/runs/cache: none; " in inspect(train_files="a.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]
