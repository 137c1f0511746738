"""predict as a filter and as a question: --instruction, standard input and output, and the endings of --output."""

import csv
import io
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest

from lit_phi2.cli.main import main

ROWS = [
    {"id": "a", "instruction": "Why was the claim denied?", "input": "Code 97"},
    {"id": "b", "instruction": "Draft an appeal letter."},
    {"id": "c", "instruction": "Name it", "input": "plan review", "response": "So."},
]
Predict = Callable[..., int]


@pytest.fixture
def predict(phi_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Predict:
    """Runs predict on a random base in an empty folder; returns the exit code."""
    monkeypatch.chdir(tmp_path)
    arguments = [f"--model.base={phi_dir}", "--model.dtype=float32", "--trainer.accelerator=cpu"]

    def run(*more: object, max_new_tokens: int = 6) -> int:
        return main(["predict", *arguments, f"--model.max_new_tokens={max_new_tokens}", *map(str, more)])

    return run


@pytest.fixture
def pipe_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Makes a pipe standard input, with these lines in it; returns its other end, or closes it."""

    def pipe(*rows: object, keep_open: bool = False) -> int:
        read_end, write_end = os.pipe()
        monkeypatch.setattr(sys, "stdin", os.fdopen(read_end))
        os.write(write_end, to_lines(*rows))
        if not keep_open:
            os.close(write_end)
        return write_end

    return pipe


def to_lines(*rows: object) -> bytes:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()


@pytest.fixture
def expected(predict: Predict, write_jsonl: Callable[..., Path], tmp_path: Path) -> list[dict[str, Any]]:
    """What predict writes to a file for ROWS: the reference of every other way to ask."""
    file = tmp_path / "expected.jsonl"
    assert predict("--data.predict_files", write_jsonl(list(ROWS)), "--output", file) == 0
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr
    return stderr.partition("error: ")[2]


# One instruction


def test_an_instruction_is_answered_as_its_record_is(
    predict: Predict, expected: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """On standard output the completion alone, on standard error its figures; no file is written."""
    files = sorted(Path().rglob("*"))
    capsys.readouterr()
    for row, prediction in zip(ROWS, expected, strict=True):
        more = ["--input", row["input"]] if "input" in row else []
        assert predict("--instruction", row["instruction"], *more) == 0
        captured = capsys.readouterr()
        assert captured.out == prediction["completion"] + "\n"
        last = captured.err.splitlines()[-1]
        assert last.startswith(f"{prediction['new_tokens']} tokens")
        assert ("model.max_new_tokens" in last) == (prediction["finish_reason"] == "length")
    assert sorted(Path().rglob("*")) == files


def test_an_instruction_needs_no_records(predict: Predict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A config may name files that are not there, and a text that YAML would read as another value is a text."""
    (tmp_path / "mine.yaml").write_text("data: {predict_files: missing.jsonl}\nrun_name: mine\n")
    for text in ("Why?", "null", "# one", "- a: [b"):
        assert predict("--config", "mine.yaml", "--instruction", text) == 0
        assert capsys.readouterr().out.endswith("\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--instruction", " "], "--instruction: is empty"),
        (["--instruction="], "--instruction: is empty"),
        (["--input", "Code 97"], "--input: is the document of an --instruction, which is missing"),
        (["--instruction", "Why?", "--data.predict_files", "a.jsonl"], "--instruction and --data.predict_files"),
        (["--instruction", "Why?", "--output=a.jsonl"], "--output: has no effect with --instruction"),
        (["--instruction", "Why?\n### Response:\nSo."], "--instruction: a line begins with '### Response:'"),
        (["--instruction", "Why?", "--input", "### Input:"], "--input: a line begins with '### Input:'"),
        (["--instruction", "why " * 600], "--instruction: it has "),
        (["--instruction", "Why?", "--input", "why " * 600], "--instruction: with its input, it has "),
        (["--instruction", "caf\udce9"], "--instruction: holds half of a surrogate pair"),
    ],
)
def test_a_question_that_cannot_be_asked_is_told(
    flags: list[str], message: str, predict: Predict, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the model is loaded, whose device is logged."""
    assert predict(*flags) == 2
    stderr = capsys.readouterr().err
    assert f"error: {message}" in stderr
    assert "Traceback" not in stderr
    assert "device cpu" not in stderr


# Standard input and output


def test_a_pipe_gets_the_predictions_of_a_file(
    predict: Predict, expected: list[dict[str, Any]], pipe_in: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """In the order of the input; standard output holds nothing else, and no file is written."""
    files = sorted(Path().rglob("*"))
    capsys.readouterr()
    pipe_in(*ROWS)
    assert predict("--data.predict_files", "-", "--output", "-") == 0
    captured = capsys.readouterr()
    assert [json.loads(line) for line in captured.out.splitlines()] == expected
    assert "3 completions" in captured.err.splitlines()[-1]
    assert sorted(Path().rglob("*")) == files


def test_a_record_is_answered_before_the_next_is_sent(
    predict: Predict, expected: list[dict[str, Any]], pipe_in: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other end of the pipe waits for each answer before it sends the next record, as a chat does."""
    answered = threading.Semaphore(0)

    class Answers(io.BytesIO):
        def write(self, part: Any) -> int:
            answered.release()
            return super().write(part)

    answers = Answers()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(answers, "ascii"))
    write_end = pipe_in(ROWS[0], keep_open=True)
    in_time: list[bool] = []

    def send() -> None:
        for row in ROWS[1:]:
            in_time.append(answered.acquire(timeout=120))
            os.write(write_end, to_lines(row))
        os.close(write_end)

    thread = threading.Thread(target=send)
    thread.start()
    assert predict("--data.predict_files", "-", "--output", "-") == 0
    thread.join()
    assert in_time == [True, True]
    assert [json.loads(line) for line in answers.getvalue().splitlines()] == expected


def test_files_stream_to_standard_output_in_their_order(
    predict: Predict, expected: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert predict("--data.predict_files", "records.jsonl", "--output", "-") == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == expected


def test_standard_input_can_be_predicted_into_a_file(
    predict: Predict, expected: list[dict[str, Any]], pipe_in: Callable[..., int], tmp_path: Path
) -> None:
    pipe_in(*ROWS)
    assert predict("--data.predict_files", "-", "--output", "out.jsonl") == 0
    lines = (tmp_path / "out.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == expected


def test_an_invalid_record_ends_the_stream_after_the_answers_before_it(
    predict: Predict, expected: list[dict[str, Any]], pipe_in: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named by its line, and its text is in no message."""
    pipe_in(ROWS[0], "", {"instruction": 20230417}, ROWS[1])
    capsys.readouterr()
    assert predict("--data.predict_files", "-", "--output", "-") == 2
    captured = capsys.readouterr()
    assert [json.loads(line) for line in captured.out.splitlines()] == expected[:1]
    assert "error: <stdin>:3: field 'instruction' is a number" in captured.err
    assert "20230417" not in captured.err


def test_invalid_records_can_be_skipped_in_a_stream(
    predict: Predict, expected: list[dict[str, Any]], pipe_in: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    pipe_in("{broken", ROWS[0], {"id": "a", "instruction": "again"}, ROWS[1], '{"instruction": "caf\\udce9"}', ROWS[2])
    capsys.readouterr()
    assert predict("--data.predict_files", "-", "--output", "-", "--data.on_bad_record", "skip") == 0
    captured = capsys.readouterr()
    assert [json.loads(line) for line in captured.out.splitlines()] == expected
    told = [line.partition(": ")[2] for line in captured.err.splitlines() if line.startswith("left out: ")]
    assert [line.partition(": ")[0] for line in told] == ["<stdin>:1", "<stdin>:3", "<stdin>:5"]


def test_bytes_that_are_not_utf8_cost_one_record(
    predict: Predict, expected: list[dict[str, Any]], pipe_in: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Standard input cannot be read again to find its encoding."""
    capsys.readouterr()
    write_end = pipe_in(ROWS[0], keep_open=True)
    line = '{"instruction": "café"}\n'
    os.write(write_end, line.encode("latin-1") + to_lines(ROWS[1]))
    os.close(write_end)
    assert predict("--data.predict_files", "-", "--output", "-", "--data.on_bad_record", "skip") == 0
    captured = capsys.readouterr()
    assert [json.loads(line) for line in captured.out.splitlines()] == expected[:2]
    assert f"left out: <stdin>:2: is not UTF-8 at column {line.index('é') + 1}" in captured.err


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        ([], [], "<stdin>: is empty"),
        (["[", '{"instruction": "Why?"}', "]"], [], "<stdin>:1: begins a JSON array"),
        (ROWS, ["--trainer.devices=2"], "data.predict_files and --output: - can be used by one process"),
        (ROWS, ["--data.encoding=utf-16"], "<stdin>"),
    ],
)
def test_a_stream_that_cannot_be_read_is_refused(
    rows: list[Any],
    flags: list[str],
    message: str,
    predict: Predict,
    pipe_in: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    pipe_in(*rows)
    assert predict("--data.predict_files", "-", "--output", "-", *flags) == 2
    assert error_of(capsys).startswith(message)


def test_only_predict_reads_standard_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--data.train_files", "-", "--data.val_files", "null"]) == 2
    assert error_of(capsys).startswith("data.train_files: - is standard input, which only predict_files can be")


def test_a_reader_that_leaves_ends_the_stream_quietly(
    predict: Predict, pipe_in: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `| head -1` does; the exit code is a shell's for SIGPIPE."""
    pipe_in(*ROWS)
    read_end, write_end = os.pipe()
    os.close(read_end)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", os.fdopen(write_end, "w"))
        assert predict("--data.predict_files", "-", "--output", "-") == 141
    stderr = capsys.readouterr().err
    assert "error" not in stderr
    assert "Traceback" not in stderr


# Endings of --output


def test_the_ending_of_output_gives_the_format(
    predict: Predict, expected: list[dict[str, Any]], tmp_path: Path
) -> None:
    for name in ("out.csv", "out.parquet"):
        assert predict("--data.predict_files", "records.jsonl", "--output", name) == 0
    text = (tmp_path / "out.csv").read_bytes().decode("utf-8-sig")
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert [(row["id"], row["finish_reason"], int(row["new_tokens"])) for row in rows] == [
        (row["id"], row["finish_reason"], row["new_tokens"]) for row in expected
    ]
    absent = {"reference": None, "truncated": False}
    assert parquet.read_table(tmp_path / "out.parquet").to_pylist() == [absent | row for row in expected]
    assert not list(tmp_path.glob("out.*.part*"))


def test_an_unknown_ending_is_refused_before_records_are_read(
    predict: Predict, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict("--data.predict_files", "missing.jsonl", "--output", "out.xlsx") == 2
    assert error_of(capsys).startswith("--output out.xlsx: has the ending '.xlsx'; expected .jsonl, .csv or .parquet")
