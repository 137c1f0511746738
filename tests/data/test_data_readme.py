"""The examples of lit_phi2/data/README.md, each written to a file of its kind and read."""

import gzip
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from helpers import ROOT
from lit_phi2.data.readers.files import FORMATS
from lit_phi2.data.records import ReadOptions, Record, iter_records

PAGE = (ROOT / "lit_phi2" / "data" / "README.md").read_text("utf-8")
SECTIONS = {section.partition("\n")[0]: section for section in re.split(r"(?m)^## ", PAGE)}
SOURCES, FORMS = (re.findall(r"(?ms)^```(\w+) ?(\S*)\n(.*?)^```$", SECTIONS[name]) for name in ("Sources", "Forms"))

FIRST, SECOND = ("Why was it denied?", "", "No referral."), ("May I appeal?", "", "Yes.")
BRIEF = ("Be brief.\n\nMay I appeal?", "", "Yes.")
EXPECTED_FORMS = {
    "instruction": [("Why was it denied?", "Code 97", "It is bundled."), SECOND],
    "prompt/completion": [FIRST, SECOND],
    "messages": [FIRST, BRIEF],
    "conversations": [FIRST, BRIEF],
}
EXPECTED_SOURCES = {
    "jsonl": [FIRST, SECOND],
    "json": [FIRST, SECOND],
    "csv": [FIRST],
    "tsv": [FIRST],
    "python": [FIRST],  # writes mine.parquet
}


def read(path: Path) -> tuple[list[tuple[str, str, str]], str]:
    """The texts of all records, none of which is invalid, and the form of the file."""
    forms: dict[str, str] = {}
    records = list(iter_records([str(path)], ReadOptions(), needs_response=True, forms=forms))
    assert all(isinstance(record, Record) for record in records), records
    texts = [(r.instruction, r.input, r.response) for r in records if isinstance(r, Record)]
    return texts, forms[str(path)]


@pytest.mark.parametrize("form", EXPECTED_FORMS)
def test_each_form_on_the_page_is_read_as_the_page_says(form: str, tmp_path: Path) -> None:
    (example,) = [text for _, name, text in FORMS if name == form]
    assert example.count("\n") == 2
    path = tmp_path / "mine.jsonl"
    path.write_text(example, "utf-8")
    assert read(path) == (EXPECTED_FORMS[form], form)


@pytest.mark.parametrize("kind", EXPECTED_SOURCES)
def test_each_file_kind_on_the_page_is_read(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = [text for name, _, text in SOURCES if name == kind]
    assert example.count("\n") == 2
    path = tmp_path / f"mine.{'parquet' if kind == 'python' else kind}"
    if kind == "python":
        monkeypatch.chdir(tmp_path)
        exec(example, {"pyarrow": pyarrow})
    else:
        path.write_text(example, "utf-8")
    content = path.read_bytes()
    paths = [path, *(path.with_name(f"{path.name}{ending}") for ending in (".gz", ".zst"))]
    paths += [path.with_name("MINE" + path.suffix.upper())]
    paths[1].write_bytes(gzip.compress(content))
    with pyarrow.output_stream(str(paths[2]), compression="zstd") as stream:
        stream.write(content)
    paths[3].write_bytes(content)
    for path in paths:
        assert read(path) == (EXPECTED_SOURCES[kind], "instruction"), path


def test_the_page_shows_every_form_and_every_file_kind() -> None:
    assert {name for _, name, _ in FORMS} == set(EXPECTED_FORMS)
    assert {name for name, _, _ in SOURCES} == set(EXPECTED_SOURCES)
    for ending in FORMATS:
        assert f"mine{ending}" in PAGE
    for form in EXPECTED_FORMS:
        assert f"| `{form}` |" in PAGE
