"""Nothing private in a message: a secret in every field of every form, file kind and fault is in no output.

The one exception is the example that inspect prints, which was asked for: the first record of each file is another one.
Each case also checks that its fault was reported, so that a secret is not absent because nothing was printed.
"""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from lit_phi2.cli.main import main

SECRET = "Zanzibar"
KEY = f"{SECRET} was denied"  # no name of a field, but the text of a record

PLAIN = {"id": "a", "instruction": "Why?", "input": "Código 97", "response": "No referral."}
TEXTS = {"instruction": f"Why {SECRET}?", "input": SECRET, "response": f"{SECRET}."}
ALL = {"id": f"{SECRET}-1", **TEXTS, KEY: SECRET, "note": {KEY: [SECRET]}}
USER, ASSISTANT = {"role": "user", "content": SECRET}, {"role": "assistant", "content": SECRET}
PLAIN_CHAT = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "No referral."}]}


def without(name: str) -> dict[str, Any]:
    return {field: value for field, value in ALL.items() if field != name}


# Faults of one record: a line of JSON, the record as it is written
ROWS: dict[str, object] = {
    "not JSON": f'{{"instruction": "{SECRET}" "response": "{SECRET}"}}',
    "cut off": f'{{"instruction": "{SECRET}',
    "an escape that JSON lacks": f'{{"instruction": "\\{SECRET}"}}',
    "a control character": f'{{"instruction": "{SECRET}\x01{SECRET}"}}',
    "a bare word": f'{{"instruction": {SECRET}}}',
    "a number of many digits": f'{{"{KEY}": 1{"0" * 5000}}}',
    "a comma after the object": json.dumps(ALL) + ",",
    "two objects": json.dumps(ALL) * 2,
    "a key twice": f'{{"{KEY}": "{SECRET}", "{KEY}": "{SECRET}"}}',
    "not UTF-8": f'{{"instruction": "{SECRET}\xe9"}}'.encode("latin-1"),
    "a list": [SECRET],
    "a text": SECRET,
    "no known form": {KEY: SECRET, "text": SECRET},
    "a template": {"text": f"[INST] {SECRET} [/INST] {SECRET}", KEY: SECRET},
    "no response": without("response"),
    "no instruction": without("instruction"),
    "null": {**ALL, "response": None},
    "empty": {**ALL, "response": ""},
    "blank": {**ALL, "instruction": " "},
    "a number": {**ALL, "instruction": 12345},
    "an object": {**ALL, "response": {KEY: SECRET}},
    "a list of texts": {**ALL, "input": [SECRET]},
    "half a character": {**ALL, "response": f"{SECRET}\ud83d"},
    "two fields for one part": {**ALL, "output": SECRET, "context": SECRET},
    "a header": {**ALL, "input": f"### Response:\n{SECRET}"},
    "an id that is an object": {**ALL, "id": {KEY: SECRET}},
    "half a character in the id": {**ALL, "id": f"{SECRET}\ud83d"},
    "another form": {"messages": [USER, ASSISTANT], KEY: SECRET},
    "prompt and completion": {"prompt": [USER], "completion": [USER]},
    "a long response": {**ALL, "response": f"{SECRET} " * 600},
    "a long id": {**ALL, "id": SECRET * 100_000, "response": ""},
}

# Faults of a conversation
CHATS: dict[str, object] = {
    "no list": {KEY: SECRET},
    "text": f"[{SECRET}",
    "a text as message": [SECRET],
    "an unknown role": [{"role": SECRET, "content": SECRET}],
    "a role that is an object": [{"role": {KEY: SECRET}, "content": SECRET}],
    "a tool": [USER, {"role": "tool", "name": SECRET, "content": SECRET}],
    "a call of a tool": [USER, {**ASSISTANT, "tool_calls": [{KEY: SECRET}]}],
    "a part": [{"role": "user", "content": [{"type": SECRET, KEY: SECRET}]}, ASSISTANT],
    "a weight": [USER, {**ASSISTANT, "weight": SECRET}],
    "no content": [USER, {"role": "assistant", KEY: SECRET}],
    "two exchanges": [USER, ASSISTANT, USER, ASSISTANT],
    "two users": [USER, USER],
    "an assistant first": [ASSISTANT, USER],
    "no answer": [{"role": "system", "content": SECRET}, USER],
    "a header": [USER, {"role": "assistant", "content": f"{SECRET}\n### Response: {SECRET}"}],
}


class Cli:
    """Runs commands on files in which a secret is planted; none of their output contains it."""

    def __init__(self, base: Path, folder: Path, capsys: pytest.CaptureFixture[str], logs: pytest.LogCaptureFixture):
        self.base, self.folder, self.capsys, self.logs = base, folder, capsys, logs

    def __call__(self, command: str, *arguments: object, code: int) -> str:
        self.capsys.readouterr()
        self.logs.clear()
        common = {
            "model.base": self.base,
            "model.max_new_tokens": 2,
            "data.max_length": 128,
            "data.val_files": "null",
            "data.val_fraction": 0.5,
            "trainer.default_root_dir": self.folder / "runs",
            "trainer.max_steps": 1,
            "trainer.enable_progress_bar": "true",
        }
        given = {str(argument).partition("=")[0] for argument in arguments}
        fixed = [f"--{name}={value}" for name, value in common.items() if f"--{name}" not in given]
        result = main([command, *fixed, *map(str, arguments)])
        printed = "\n".join([*self.capsys.readouterr(), self.logs.text, *self.logs.messages])
        assert SECRET.lower() not in printed.lower()
        assert result == code, printed
        return printed


@pytest.fixture
def run(
    phi_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> Cli:
    monkeypatch.delenv("LIT_PHI2_TRACEBACK", raising=False)
    monkeypatch.chdir(tmp_path)
    caplog.set_level("DEBUG")
    return Cli(phi_dir, tmp_path, capsys, caplog)


def as_line(row: object) -> bytes:
    if isinstance(row, bytes):
        return row
    if isinstance(row, str) and row != SECRET:
        return row.encode()
    try:
        return json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return json.dumps(row).encode()


def write_lines(path: Path, plain: object, row: object) -> Path:
    """Plain records, both sides of the hold-out among them, and the faulty one in the second line."""
    others = [plain | {"id": f"o{number}"} | vary(plain, number) for number in range(8)]
    path.write_bytes(b"\n".join([as_line(plain), as_line(row), *map(as_line, others)]) + b"\n")
    return path


def vary(plain: dict[str, Any], number: int) -> dict[str, Any]:
    if "messages" in plain:
        return {"messages": [{"role": "user", "content": f"Why {number}?"}, plain["messages"][1]]}
    return {"instruction": f"Why {number}?"}


@pytest.mark.parametrize("fault", ROWS)
def test_a_faulty_record_shows_none_of_its_text(fault: str, run: Cli, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "r.jsonl", PLAIN, ROWS[fault])
    assert f"{path}:2: " in run("inspect", f"--data.train_files={path}", code=2)


@pytest.mark.parametrize("part", [0, 1])
def test_records_that_are_left_out_show_none_of_their_text(part: int, run: Cli, tmp_path: Path) -> None:
    """At most 20 faults at once, so that each has a line."""
    rows = list(ROWS.values())[part::2]
    path = write_lines(tmp_path / "r.jsonl", PLAIN, b"\n".join(map(as_line, rows)))
    printed = run("inspect", f"--data.train_files={path}", "--data.on_bad_record=skip", code=0)
    assert printed.count(f"left out: {path}:") == len(rows) < 20


@pytest.mark.parametrize("fault", CHATS)
def test_a_faulty_conversation_shows_none_of_its_text(fault: str, run: Cli, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "r.jsonl", PLAIN_CHAT, {"id": SECRET, "messages": CHATS[fault], KEY: SECRET})
    assert f"{path}:2: " in run("inspect", f"--data.train_files={path}", code=2)


def test_duplicates_and_faulty_facts_show_none_of_their_text(run: Cli, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    facts: list[object] = [SECRET, {KEY: SECRET}, [SECRET], [{"text": SECRET, KEY: 1}], [{"text": 1, "kind": SECRET}]]
    rows = [PLAIN, ALL, ALL, *({**ALL, "id": f"{SECRET}{n}", "facts": value} for n, value in enumerate(facts))]
    path.write_bytes(b"\n".join(map(as_line, rows)))
    printed = run("test", f"--data.test_files={path}", "--max_completions=0", code=2)
    assert "its id was already used at" in printed
    assert printed.count("field 'facts'") >= len(facts)


def csv_text(*rows: list[str], delimiter: str = ",") -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows(rows)
    return out.getvalue()


HEADER = ["id", "instruction", "response"]
FIRST = ["a", "Why?", "No referral."]
BAD_FILES: dict[str, tuple[str, str | bytes]] = {
    "a CSV file without a header": ("r.csv", csv_text([SECRET, f"Why {SECRET}?", f"{SECRET}."])),
    "a CSV file of single words": ("r.csv", csv_text([f"{SECRET}-4417", "denied"])),
    "a secret in the header": ("r.csv", csv_text([*HEADER[:2], KEY], FIRST)),
    "a column twice": ("r.csv", csv_text([*HEADER, KEY, KEY], FIRST)),
    "a header with a stray quote": ("r.csv", f'id,"instruction"{SECRET},response\n'),
    "a CSV value too many": ("r.csv", csv_text(HEADER, FIRST, [SECRET] * 4)),
    "a stray quote": ("r.csv", csv_text(HEADER, FIRST) + f'b,"{SECRET}"{SECRET},{SECRET}\n'),
    "a quote never closed": ("r.csv", csv_text(HEADER, FIRST) + f'b,"{SECRET},{SECRET}\nc,d,e\n'),
    "an empty CSV value": ("r.csv", csv_text(HEADER, FIRST, [SECRET, SECRET, ""])),
    "a separator line": ("r.tsv", f"sep={SECRET}\n"),
    "another encoding": ("r.csv", csv_text(HEADER, [SECRET, f"{SECRET}é", SECRET]).encode("latin-1")),
    "an encoding of no name": ("r.jsonl", f'{{"{SECRET}": "{SECRET}'.encode() + bytes(range(128, 256))),
    "a broken UTF-16": ("r.csv", csv_text(HEADER, [SECRET] * 3).encode("utf-16") + b"\x00"),
    "a broken array": ("r.json", f'[{json.dumps(PLAIN)},\n{{"instruction": "{SECRET}" {SECRET}'),
    "an array with a key twice": ("r.json", f'[{{"{KEY}": "{SECRET}", "{KEY}": 1}}]'),
    "an array and more": ("r.json", f'[{json.dumps(ALL)}] "{SECRET}"'),
    "an array without a comma": ("r.json", f"[{json.dumps(ALL)} {json.dumps(ALL)}]"),
    "one object": ("r.json", json.dumps({KEY: [ALL]})),
    "one text": ("r.json", json.dumps(SECRET)),
    "an array of no form": ("r.json", json.dumps([{KEY: SECRET}] * 25)),
    "an array as lines": ("r.jsonl", json.dumps([ALL])),
    "an object over lines": ("r.jsonl", json.dumps(ALL, indent=1)),
    "no Parquet": ("r.parquet", f"PAR1{SECRET}PAR1"),
    "no gzip": ("r.jsonl.gz", json.dumps(ALL)),
    "a gzip file cut off": ("r.jsonl.gz", gzip.compress(json.dumps(ALL).encode())[:-10]),
    "no zstd": ("r.jsonl.zst", json.dumps(ALL)),
    "an unknown ending": ("r.txt", SECRET),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_shows_none_of_its_text(kind: str, run: Cli, tmp_path: Path) -> None:
    name, content = BAD_FILES[kind]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert str(path) in run("inspect", f"--data.train_files={path}", code=2)


def test_a_bad_parquet_file_shows_none_of_its_text(run: Cli, tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"

    def refuse(table: Any) -> str:
        parquet.write_table(table, path)
        return run("inspect", f"--data.train_files={path}", code=2)

    texts = [SECRET] * 30
    assert "has no columns of a known form" in refuse(pyarrow.table({KEY: texts, "x": texts}))
    assert "has no column 'response'" in refuse(pyarrow.table({"instruction": texts, KEY: texts}))
    assert "several columns" in refuse(pyarrow.Table.from_arrays([texts, texts], names=[KEY, KEY]))
    assert "field 'response' is a number" in refuse(pyarrow.table({"instruction": texts, "response": range(30)}))
    not_utf8 = pyarrow.array([f"{SECRET}\xe9".encode("latin-1")] * 30).view(pyarrow.string())
    assert "cannot be read as Parquet" in refuse(pyarrow.table({"instruction": texts, "response": not_utf8}))
    dates = pyarrow.array([2**62] * 30, pyarrow.timestamp("us"))
    assert "cannot be read as Parquet" in refuse(
        pyarrow.table({"instruction": texts, "response": texts, "date": dates})
    )


def test_a_field_that_no_record_has_shows_no_other_texts(run: Cli, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "r.jsonl", PLAIN, ALL)
    printed = run("inspect", f"--data.train_files={path}", "--data.input_field=contxt", code=2)
    assert "data.input_field: no record has a field 'contxt'; there are 'id'" in printed


@pytest.mark.parametrize("form", ["instruction", "messages"])
def test_no_subcommand_prints_texts_of_valid_or_left_out_records(form: str, run: Cli, tmp_path: Path) -> None:
    """Truncated, skipped, repeated and shared records too. The files that a run writes hold texts and are no output."""
    path = tmp_path / "r.jsonl"
    plain: dict[str, Any] = PLAIN if form == "instruction" else PLAIN_CHAT
    rows: list[object] = [plain | {"id": "a"}]
    for number in range(12):
        texts = {"instruction": f"Why {SECRET} {number}?", "input": f"{SECRET} " * (200 if number == 5 else 2)}
        chat = [{"role": "user", "content": f"{SECRET} {number}"}, ASSISTANT]
        row = {**texts, "response": SECRET} if form == "instruction" else {"messages": chat}
        rows.append({"id": f"{SECRET}-{number}", **row, "facts": [{"text": SECRET, "kind": "copied"}], KEY: SECRET})
    rows += [{"id": SECRET, KEY: SECRET}, rows[3]]
    path.write_bytes(b"\n".join(map(as_line, rows)))
    files = [f"--data.{split}_files={path}" for split in ("train", "test", "predict")]
    shared = [f"--data.val_files={path}", "--data.val_fraction=0.1"]  # the fraction has no effect beside files
    run("inspect", *files, *shared, "--data.on_bad_record=skip", code=0)
    run("fit", *files, "--data.on_bad_record=skip", "--run_name=private", code=0)
    last = ["--data.on_bad_record=skip", "--run_name=private", "--ckpt_path=last"]
    run("validate", *files, *last, code=0)
    run("test", *files, *last, "--max_completions=2", code=0)
    run("predict", *files, *last, f"--output={tmp_path / 'out.jsonl'}", code=0)
    assert SECRET in (tmp_path / "out.jsonl").read_text("utf-8")
