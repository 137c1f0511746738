"""scripts/bench.py generate in its short form: what it reports, from the runs that it made."""

import json
from pathlib import Path
from statistics import median

import pytest

import generation_bench
from generation_bench import main
from generation_parts.texts import read_questions


def test_every_ratio_is_that_of_the_speeds_of_its_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All systems complete the same prompts in float32, so their completions are equal too."""
    monkeypatch.setattr(generation_bench, "BUILD", tmp_path)
    main(["--quick", "--rows", "tiny", "--output", str(tmp_path / "generate.json")])
    result = json.loads((tmp_path / "generate.json").read_text("utf-8"))
    line, former, undrafted = result["lines"]
    for each, peer in ((line, "transformers"), (former, "former"), (undrafted, "without drafts")):
        speeds = each["details"]["tokens_per_second"]
        ratios = [a / b for a, b in zip(speeds["ours"], speeds[peer], strict=True)]
        assert each["value"] == pytest.approx(median(ratios))
    printed = capsys.readouterr().out
    assert "former: 4 of 4 completions equal ours" in printed
    assert f"| {line['name']} | {line['value']:.2f} | 2.5 | 4.0 |" in printed


def test_the_row_of_one_record_reports_what_a_pass_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny base in float32: its linear layers without embedding, norms and biases, counted from its config."""
    monkeypatch.setattr(generation_bench, "BUILD", tmp_path)
    main(["--quick", "--rows", "bandwidth", "--output", str(tmp_path / "generate.json")])
    (line,) = json.loads((tmp_path / "generate.json").read_text("utf-8"))["lines"]
    (run,) = line["details"]["runs"]
    config = json.loads((generation_bench.ROOT / "lit_phi2/assets/tiny-phi/config.json").read_text("utf-8"))
    width, inner = config["hidden_size"], config["intermediate_size"]
    numel = config["num_hidden_layers"] * (4 * width**2 + 2 * width * inner) + config["vocab_size"] * width
    assert run["weight_bytes"] == numel * (4 if run["dtype"] == "float32" else 2)
    assert len(run["pass_seconds"]) == 6  # of 8 tokens; the first step has the prompt's pass and one more
    assert line["value"] == pytest.approx(run["weight_bytes"] / median(run["pass_seconds"]) / run["bytes_per_second"])


def test_the_row_of_8_bits_compares_two_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation_bench, "BUILD", tmp_path)
    main(["--quick", "--rows", "int8", "--output", str(tmp_path / "generate.json")])
    (line,) = json.loads((tmp_path / "generate.json").read_text("utf-8"))["lines"]
    ((quantized,), (whole,)) = line["details"]["runs"].values()
    assert whole["weight_bytes"] in (2 * quantized["weight_bytes"], 4 * quantized["weight_bytes"])
    assert line["value"] == pytest.approx(median(whole["pass_seconds"]) / median(quantized["pass_seconds"]))


def test_forced_completions_are_the_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 tokens of each of two responses are counted, less the first of each, which the prompt's pass chose."""
    monkeypatch.setattr(generation_bench, "BUILD", tmp_path)
    main(["--quick", "--rows", "drafts", "--output", str(tmp_path / "generate.json")])
    lines = json.loads((tmp_path / "generate.json").read_text("utf-8"))["lines"]
    references = [question.reference for question in read_questions("tiny", "claims:test", 2)]
    expected = sum(min(24, len(reference)) - 1 for reference in references)
    assert [run["tokens"] for run in lines[1]["details"]["False"]] == [expected]
    assert [run["tokens"] for run in lines[1]["details"]["True"]] == [expected]
    assert [run["passes"] for run in lines[1]["details"]["False"]] == [expected]
    assert lines[1]["details"]["True"][0]["passes"] <= expected
