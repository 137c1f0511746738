"""report.html says what the files of a run say, loads nothing, and shows hostile texts as text."""

import collections
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_phi2.errors import InputError
from lit_phi2.report.page import write_report
from planted import PLANTED
from report.conftest import DIGEST, SCALARS, Page

PageOf = Callable[[Path], Page]
NewRun = Callable[..., Path]

HOSTILE = (
    "</script></style></title><script>alert(1)</script><img src=https://x.example/a onerror=alert(1)>"
    '"\' onload=alert(1) x="--><!-- ]]> {{ 7 * 7 }} {% raw %} &lt; &#x202e;'
    "\x00\x07\x1b[31m\x85\u00ad\u200b\u200f\u202e\u2028\u2066\u3164\ufeff\ud83d \U000e0041 \u05d0\u05d1"
)
LOADING = {"script", "link", "img", "iframe", "object", "embed", "base", "form", "audio", "video", "source"}


def test_numbers_are_those_of_the_files(new_run: NewRun, page_of: PageOf) -> None:
    """Reference: the numbers that conftest.py wrote."""
    page = page_of(new_run())
    assert page.row("fact recall") == [
        "fact recallFraction of a record's facts that the completion contains. Higher is better.",
        *("0.750 0.625 \u2013 0.875", "", "0.125 0.062 \u2013 0.250", "8"),
    ]
    assert page.row("length ratio")[1:] == ["1.500 1.250 \u2013 1.750", "", "2.000", "8"], "no interval without one"
    for table in ("form", "category"):
        header, row = next(rows for rows in page.tables if rows[0][0] == table)
        assert (header[2], row[:2], row[2].split()) == (
            "fact recall",
            [table, "8"],
            ["0.438", "0.406", "\u2013", "0.469"],
        )
    assert page.row("memorised")[1:] == ["3", ", ".join(f"audited file.jsonl:{line}" for line in range(3))]
    assert page.row("near duplicate")[1] == "1"
    assert page.row("membership auc")[1] == "0.562 [0.500, 0.625]"
    assert page.row("canaries canary exposure")[1] == "12.500"
    # records, left out, tokens, supervised, median, longest, truncated, rows, fill: 14 tokens in two rows of 8
    assert page.row("train")[1:] == ["4", "2", "14", "7", "4", "5", "0", "2", "87.5%"]
    assert page.row("val")[1:] == ["1", "0", "4", "2", "4", "4", "0", "1", "50.0%"]
    assert page.row("reason")[1:] == ["2"]
    assert page.row("lora_r")[1] == "2"
    assert not [row for table in page.tables for row in table if row[0] == "dtype"], "a null setting"
    titles = {attributes.get("title") for _, attributes in page.tags}
    assert {f"base {DIGEST}", f"sha256 {DIGEST}", f"sha256 {DIGEST[::-1]}"} < titles
    assert "without 2 records" in page.text


def test_rows_are_as_full_as_their_tokens_of_max_length(new_run: NewRun, page_of: PageOf) -> None:
    """The 14 tokens of the four records in one row of 20."""
    folder = new_run()
    config = (folder / "config.yaml").read_text("utf-8")
    (folder / "config.yaml").write_text(config.replace("max_length: 8", "max_length: 20"), "utf-8")
    page = page_of(folder)
    assert "1 row of up to 20 tokens in an epoch, 70.0% full." in page.text
    assert page.row("train")[8:] == ["1", "70.0%"]


def test_the_summary_says_what_became_of_the_loss(new_run: NewRun, page_of: PageOf) -> None:
    text = " ".join(page_of(new_run()).text.split())
    assert "Training took 4 optimizer steps on 4 records." in text
    assert "Validation loss fell from 4.125 (the base) to 2.500 at step 2 and was 2.750 at step 4, a sign of" in text
    assert "On 8 test records the adapter reaches fact recall 0.750 [0.625, 0.875]; the base 0.125." in text
    assert "The adapter is better than the base beyond" in text
    assert "The leakage audit passed: AUC 0.562 [0.500, 0.625], at most 0.600 passes." in text
    assert "The record audit lists 5 findings" in text
    assert "2 records could not be used." in text


def test_best_and_worst_stand_beside_base_and_reference(new_run: NewRun, page_of: PageOf) -> None:
    """The scores of the eight records rise from 0 to 7/8."""
    text = page_of(new_run()).text
    shown = re.findall(r"(best|worst) \d of 8[\s\S]*?adapter-(\d)[\s\S]*?base-(\d)", text)
    assert shown == [*(("best", n, n) for n in "765"), *(("worst", n, n) for n in "012")]
    assert text.count("reference") >= 6
    first, last = text.index("at step 0"), text.index("at step 4", text.index("sample completion"))
    assert last < first, "the adapter's sample stands before the base's"
    assert "at step 2" not in text[text.index("sample completion") :].partition("Data")[0], "only first and last"


def test_nothing_on_the_page_loads_or_runs(new_run: NewRun, page_of: PageOf) -> None:
    page = page_of(new_run(lambda place: f"{place} {HOSTILE}"))
    names = {tag for tag, _ in page.tags}
    assert not names & LOADING
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        assert not {"src", "srcset", "action", "data", "background", "poster"} & set(attributes), tag
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("href", "xlink:href"):
            assert attributes.get(name, "#") == "#" or attributes[name][1:] in ids, attributes
        clip = re.fullmatch(r"url\(#(.+)\)", attributes.get("clip-path") or "url(#x)")
        assert clip is not None
        assert clip[1] in (*ids, "x")
    assert "url(" not in page.style
    assert "@import" not in page.style
    (policy,) = (attributes for tag, attributes in page.tags if attributes.get("http-equiv"))
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"


def test_hostile_texts_are_text(new_run: NewRun, page_of: PageOf) -> None:
    """In every place: the page has the elements of a harmless one, and no character that hides or reverses text."""
    elements = []
    for name, hostile in (("harmless", ""), ("hostile<b>&\"'\u202e", HOSTILE)):
        page = page_of(new_run(lambda place, hostile=hostile: f"{place} {hostile}", name))
        marks = [tag for tag, attributes in page.tags if tag == "bdi" or attributes.get("class") == "cp"]
        counts = collections.Counter(tag for tag, _ in page.tags)
        elements.append(counts - collections.Counter(marks))
    assert elements[0] == elements[1]
    html = " ".join(page.text.split())
    assert html.count("<script>alert(1)</script>") > 20
    for char in "\x00\x07\x1b\x85\u00ad\u200b\u200f\u202e\u2028\u2066\u3164\ufeff\ud83d\U000e0041":
        assert f"U+{ord(char):04X}" in page.text
    written = page.text + "".join(value or "" for _, attributes in page.tags for value in attributes.values())
    assert not [char for char in set(written) - set("\n\t\u200a") if not (char.isprintable() or char == "\u00a0")]
    assert "{{ 7 * 7 }}" in page.text
    assert "U+202E" in page.text.partition("Training")[0], "in the title, too"


def test_identifiers_are_placeholders_beyond_the_samples(new_run: NewRun, page_of: PageOf) -> None:
    """Reference: identifiers of every kind in the words that people write around them."""
    pairs = [pair for kind in PLANTED.values() for pair in kind]
    sentences = " / ".join(words.format(value) for words, value in pairs)
    unredacted = ("device", "version", "subject")  # no text of a record, and known to be no identifier
    page = page_of(new_run(lambda place: place if place in unredacted else f"{place}: {sentences}"))
    start = page.text.index("Samples during training")
    end = page.text.index("Split", start)
    attributes = str([value for _, found in page.tags for value in found.values()])
    elsewhere = page.text[:start] + page.text[end:] + attributes
    assert [value for _, value in pairs if value in elsewhere] == []
    assert [kind for kind in PLANTED if f"[{kind.upper()}_" not in elsewhere] == []
    assert [value for _, value in pairs if value.isascii() and value not in page.text[start:end]] == []
    assert DIGEST[:16] in page.text, "a digest is no identifier"


def test_absent_parts_are_named(tmp_path: Path, page_of: PageOf) -> None:
    (folder := tmp_path / "run").mkdir()
    (folder / "config.yaml").write_text("model: {base: tiny}\n")
    text = page_of(folder).text
    for part in ("No curves", "Not tested", "No completions", "No samples", "No counts", "No provenance"):
        assert part in text
    assert text.count("Not audited") == 2
    assert "lit-phi2 audit --config RUN/config.yaml --ckpt_path best --what leakage" in text


@pytest.mark.parametrize("name", ["", "test_metrics.json", "audit_leakage.json", "ledger.parquet", "samples.jsonl"])
def test_a_folder_that_is_no_run_is_refused(name: str, new_run: NewRun, tmp_path: Path) -> None:
    """An empty one, and one with a damaged file, which the message names."""
    folder = new_run() if name else tmp_path
    if name:
        (folder / name).write_bytes(b"\xff damaged\n")
    with pytest.raises(InputError, match=name or "nothing of a run"):
        write_report(folder, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_the_same_files_give_the_same_bytes(new_run: NewRun, tmp_path: Path) -> None:
    folder = new_run()
    copy = tmp_path / "copy" / "claims" / "version_3"
    shutil.copytree(folder, copy)
    write_report(folder, tmp_path / "a.html")
    write_report(copy, tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_drawings_have_the_colours_of_the_page_alone(new_run: NewRun, page_of: PageOf) -> None:
    page = page_of(new_run())
    assert [attributes["class"] for tag, attributes in page.tags if tag == "svg"].count("chart") == len(SCALARS) + 1
    drawn = ";".join(attributes.get("style") or "" for _, attributes in page.tags)
    assert not re.search(r"#[0-9a-f]{3}|rgb", drawn)
    variables = set(re.findall(r"var\((--[\w-]+)\)", drawn))
    assert {"--muted", "--rule", "--c1", "--c2"} == variables
    assert all(page.style.count(f"{name}:") >= 3 for name in variables), "light, dark, printed"
