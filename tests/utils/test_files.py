"""Files of ours are complete whenever they are read, whoever writes them, and lines end at line feeds alone."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers import ROOT
from lit_phi2.errors import InputError
from lit_phi2.utils.files import atomic_write, read_json_lines

LINE_ENDS = "\x0b \x0c \x1c \x1d \x1e \x85 \u2028 \u2029 \r"  # at which str.splitlines splits

WRITE_50_TIMES = """
import sys
from pathlib import Path
from lit_phi2.utils.files import atomic_write
for _ in range(50):
    atomic_write(Path(sys.argv[1]), sys.argv[2] * 100_000)
"""


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    objects = [{"text": LINE_ENDS, "n": number} for number in range(3)]
    file = tmp_path / "x.jsonl"
    file.write_bytes("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in objects).encode())
    assert LINE_ENDS.encode() not in file.read_bytes(), "JSON escapes the control characters"
    assert "\x85 \u2028 \u2029".encode() in file.read_bytes()
    assert list(read_json_lines(file)) == objects


def test_a_last_line_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    whole = '{"text": "é"}\n'.encode()
    for length in range(len(whole)):
        file.write_bytes(whole + whole[:length])
        assert list(read_json_lines(file)) == [{"text": "é"}]


@pytest.mark.parametrize("line", ["{", "", "[1]", "null", "\x00\x00", "{} {}"])
def test_a_damaged_line_is_named_by_its_number(line: str, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(f'{{"step": 0}}\n{line}\n{{"step": 1}}\n')
    with pytest.raises(InputError, match=r"x\.jsonl:2: is damaged; expected a JSON object"):
        list(read_json_lines(file))


def test_two_processes_that_write_one_file_leave_it_whole(tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITE_50_TIMES, str(file), letter], cwd=ROOT) for letter in "abc"
    ]
    contents = set()
    while any(writer.poll() is None for writer in writers):
        if file.is_file():
            contents.add(file.read_text())
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert contents <= {letter * 100_000 for letter in "abc"}
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]


def test_the_next_write_removes_what_a_kill_left(tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    program = "import os, signal\n" + WRITE_50_TIMES.replace(
        "sys.argv[2] * 100_000", "(os.kill(os.getpid(), signal.SIGKILL) if n else 'half' for n in range(2))"
    )
    subprocess.run([sys.executable, "-c", program, str(file)], cwd=ROOT)
    assert list(tmp_path.iterdir()), "the kill left something"
    atomic_write(file, "whole")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x.txt", "whole")]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EINVAL])
def test_a_system_that_opens_no_folders_still_writes(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows answers EACCES to os.open of a folder."""
    system_open = os.open

    def open_files_only(path: Any, *args: Any, **options: Any) -> int:
        if Path(path).is_dir():
            raise OSError(code, "cannot open a folder", str(path))
        return system_open(path, *args, **options)

    monkeypatch.setattr(os, "open", open_files_only)
    atomic_write(tmp_path / "x.txt", "new")
    assert (tmp_path / "x.txt").read_text() == "new"
