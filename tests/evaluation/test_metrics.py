"""What test says of answers: every figure against a count by hand, and the whole run against the model asked alone."""

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerBase

from helpers import new_data, new_module, new_trainer
from lit_phi2.adapters.peft_format import save_adapter
from lit_phi2.cli.main import main
from lit_phi2.data.prompts import format_prompt
from lit_phi2.data.records import Fact, FieldNames, Record, read_records
from lit_phi2.errors import InputError
from lit_phi2.evaluation.baselines import nearest_neighbors
from lit_phi2.evaluation.metrics import (
    Interval,
    bootstrap,
    compare_with_baselines,
    has_repeated_ngram,
    match_facts,
    score_completions,
    summarize,
)
from lit_phi2.evaluation.table import format_table, metric_name
from lit_phi2.generation.engine import Completion
from lit_phi2.model.lora import trainable_parameters
from lit_phi2.training.callbacks.completions import TestCompletions
from lit_phi2.training.module import LitPhi2
from lit_phi2.training.trainer import Trainer

Jsonl = Callable[..., Path]
Rows = list[dict[str, Any]]
Ask = Callable[..., int]


def record(response: str, *facts: tuple[str, str], prompt: str = "Why?", form: str = "", category: str = "") -> Record:
    return Record("r", prompt, "", response, "records.jsonl:1", category, form, tuple(Fact(*fact) for fact in facts))


# Facts


@pytest.mark.parametrize(
    ("fact", "text"),
    [
        ("Peer-to-Peer call", "ask for a PEER-TO-PEER CALL now"),
        ("letter of appeal", "a letter  of\tappeal"),
        ("letter of appeal", "a letter\n\nof appeal"),
        ("letter\n of appeal", "a Letter of Appeal"),
        ("Straße", "an der STRASSE"),
    ],
)
def test_a_fact_is_found_whatever_the_case_the_spaces_and_the_line_breaks(fact: str, text: str) -> None:
    assert match_facts([Fact(fact, "known")], text, reference=text) == [True]


def test_a_fact_in_other_words_is_not_found_and_each_fact_is_told_apart() -> None:
    facts = [Fact("180 days", "known"), Fact("half a year", "known"), Fact("in writing", "known")]
    assert match_facts(facts, "Appeal within 180 days, in writing.", "Appeal within half a year.  " * 2) == [
        True,
        False,
        True,
    ]


@pytest.mark.parametrize(("length", "held"), [(14, True), (15, True), (16, False)])
def test_an_answer_over_one_and_a_half_times_the_reference_holds_no_fact(length: int, held: bool) -> None:
    """Of ten characters: fifteen are allowed, sixteen are not."""
    text = "fact" + "x" * (length - 4)
    assert match_facts([Fact("fact", "known")], text, "r" * 10) == [held]


def test_spaces_make_neither_answer_nor_reference_longer() -> None:
    assert match_facts([Fact("a b", "known")], "a" + " \n" * 50 + "b", "a b") == [True]
    assert match_facts([Fact("a b", "known")], "a b, c d", "a" + " \n" * 50 + "b") == [False]


# Other figures


def test_eight_words_that_come_twice_are_a_repeat_and_seven_are_not() -> None:
    seven, eight = "a b c d e f g", "a b c d e f g h"
    assert has_repeated_ngram(f"{eight} and then {eight}")
    assert has_repeated_ngram(f"{eight} A B  C D E\nF G H"), "case and spaces folded"
    assert has_repeated_ngram("no " * 9), "the same eight words, one word further on"
    assert not has_repeated_ngram("no " * 8)
    assert not has_repeated_ngram(f"{seven} x {seven} y")
    assert not has_repeated_ngram("")


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    """By hand: the, cat, on, mats are common and in order: 4 of 5 words and 4 of 6, so F1 is 2 * 4 / (5 + 6).
    Said backwards, three are in order, "the lay the": 2 * 3 / (6 + 6)."""
    asked = [record("The cat lay on the mats.")] * 4
    texts = ["the Cat sat on mats", "the cat lay on the mats", "mats the on lay cat the", "  "]
    got = [figures.rouge_l for figures in score_completions(asked, texts)]
    assert got == pytest.approx([8 / 11, 1.0, 2 * 3 / 12, 0.0], abs=1e-6)


def test_the_length_ratio_is_the_words_of_all_answers_over_those_of_all_references() -> None:
    """By hand: 3 + 1 words for 2 + 6; a mean of the two ratios would be 0.83."""
    asked = [record("two words"), record("a b c d e f")]
    assert summarize(asked, score_completions(asked, ["x y z", "x"]))["length ratio"].mean == pytest.approx(4 / 8)


def test_the_interval_of_equal_values_is_their_value() -> None:
    assert bootstrap([0.5] * 7) == Interval(0.5, 0.5, 0.5, 7)
    assert bootstrap([1.0]) == Interval(1.0, 1.0, 1.0, 1)


def test_the_bootstrap_interval_is_close_to_the_normal_approximation() -> None:
    """600 of 2,000: mean +- 1.96 sqrt(p (1 - p) / n). 1,000 samples leave an error of about 0.001 in either end; an
    interval of 90 % would be 0.003 off."""
    got = bootstrap([1.0] * 600 + [0.0] * 1400)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 2000)
    assert got.mean == pytest.approx(0.3)
    assert (got.low, got.high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.002)
    assert got.records == 2000


def test_the_same_values_have_the_same_interval_whatever_drew_random_numbers_before() -> None:
    values = list(np.random.default_rng(1).random(50))
    first = bootstrap(values)
    np.random.seed(7)
    np.random.random(3)
    assert bootstrap(values) == first
    assert first.low < first.mean < first.high


THREE = [
    record(
        "r" * 60,
        ("aaaa", "copied"),
        ("bbbb", "known"),
        ("cccc", "known"),
        form="explain",
        category="bundling",
        prompt="1",
    ),
    record("r" * 60, ("dddd", "known"), form="draft", category="bundling", prompt="2"),
    record("r" * 60, ("eeee", "copied"), ("ffff", "reasoned"), form="explain", category="timely filing", prompt="3"),
]
ANSWERS = ["aaaa and cccc", "nothing", "ffff, then eeee"]  # 2 of 3 facts, 0 of 1, 2 of 2


def recalls() -> dict[str, tuple[float, int]]:
    rows = summarize(THREE, score_completions(THREE, ANSWERS))
    return {name: (interval.mean, interval.records) for name, interval in rows.items()}


def test_recall_is_a_mean_over_records_and_not_over_facts() -> None:
    """By hand: (2/3 + 0 + 1) / 3; over facts it would be 4/6."""
    assert recalls()["fact recall"] == (pytest.approx(5 / 9), 3)


def test_recall_by_kind_counts_a_records_facts_of_that_kind_alone() -> None:
    """By hand: copied (1 + 1) / 2; known (1/2 + 0) / 2; reasoned 1 / 1."""
    got = {name: value for name, value in recalls().items() if name.startswith("facts ")}
    assert got == {"facts copied": (1.0, 2), "facts known": (0.25, 2), "facts reasoned": (1.0, 1)}


def test_recall_by_form_and_category_is_that_of_their_records() -> None:
    """By hand: explain (2/3 + 1) / 2, draft 0; bundling (2/3 + 0) / 2, timely filing 1."""
    got = {name: value for name, value in recalls().items() if name.startswith(("form ", "category "))}
    assert got == {
        "form draft": (0.0, 1),
        "form explain": (pytest.approx(5 / 6), 2),
        "category bundling": (pytest.approx(1 / 3), 2),
        "category timely filing": (1.0, 1),
    }


def test_a_record_without_facts_counts_in_every_figure_but_recall() -> None:
    plain = record("r" * 60, form="explain", category="bundling")
    rows = summarize([*THREE, plain], score_completions([*THREE, plain], [*ANSWERS, "words"]))
    assert (rows["fact recall"].records, rows["form explain"].records, rows["category bundling"].records) == (3, 2, 2)
    assert {rows[name].records for name in ("ROUGE-L", "length ratio", "repeated 8-gram")} == {4}


def test_where_no_record_has_facts_there_are_no_recall_rows_but_all_others() -> None:
    asked = [record("some words", form="explain", category="bundling")]
    columns = compare_with_baselines(asked, {"base": (["some"], [True])}, asked)
    others = ["ROUGE-L", "length ratio", "repeated 8-gram"]
    assert {name: list(rows) for name, rows in columns.items()} == {
        "base": [*others, "eos_rate"],
        "copy_prompt": others,
        "nearest": others,
    }


def test_ends_by_itself_is_the_share_of_answers_that_were_not_cut() -> None:
    columns = compare_with_baselines(THREE, {"base": (ANSWERS, [True, False, False])}, [])
    assert columns["base"]["eos_rate"].mean == pytest.approx(1 / 3)


# Baselines


def test_echo_finds_exactly_the_facts_that_stand_in_the_prompt() -> None:
    asked = [
        Record(
            "r", "Why was CLM-12\ndenied", "Code 97", "CLM-12 was bundled, see code 97, it says.", "x:1", "", "",
            (Fact("CLM-12 denied", "copied"), Fact("code 97", "copied"), Fact("bundled", "known")),
        )
    ]  # fmt: skip
    echo = compare_with_baselines(asked, {"base": ([""], [True])}, [])["copy_prompt"]
    assert (echo["facts copied"].mean, echo["facts known"].mean) == (1.0, 0.0)
    assert echo["fact recall"].mean == pytest.approx(2 / 3)


def test_the_nearest_baseline_answers_with_the_response_of_the_most_similar_training_prompt() -> None:
    train = [
        record("gggg", prompt="a late claim"),
        record("aaaa bbbb", prompt="a denied scan"),
        record("x", prompt="y"),
    ]
    asked = [record("aaaa bbbb", ("aaaa", "known"), prompt="the scan, denied?")]
    columns = compare_with_baselines(asked, {"base": ([""], [True])}, train)
    assert columns["nearest"]["ROUGE-L"].mean == pytest.approx(1.0)
    assert columns["nearest"]["fact recall"].mean == 1.0
    assert list(columns) == ["base", "copy_prompt", "nearest"]


def cosines(known: list[str], asked: list[str]) -> np.ndarray:
    """(asked, known) cosines of count * (ln((1 + N) / (1 + df)) + 1), dense, in float64."""
    split = [re.findall(r"\w+", text.lower()) for text in known + asked]
    words = sorted({word for text in split[: len(known)] for word in text})
    counts = np.array([[Counter(text)[word] for word in words] for text in split], dtype=np.float64)
    df = (counts[: len(known)] > 0).sum(axis=0)
    rows = counts * (np.log((1 + len(known)) / (1 + df)) + 1)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)
    return rows[len(known) :] @ rows[: len(known)].T


@pytest.mark.parametrize("num_known", [6, 80])
def test_nearest_is_the_highest_tf_idf_cosine_by_brute_force(num_known: int) -> None:
    """100 texts against few and many, of frequent and of rare words. Where two cosines differ by less than 1e-6 either
    is right, since float32 is not better than that; only few do."""
    rng = np.random.default_rng(0)
    words = np.array([f"Word{number}" for number in range(60)])
    share = 1 / np.arange(1, 61)
    share /= share.sum()
    known, asked = (
        [" ".join(rng.choice(words, size=rng.integers(3, 20), p=share)) + "?" for _ in range(count)]
        for count in (num_known, 100)
    )
    asked[5] += " unheard unheard unheard"
    expected = cosines(known, asked)
    ordered = np.sort(expected, axis=1)
    decided = ordered[:, -1] - ordered[:, -2] > 1e-6
    assert decided.sum() > 90
    got = np.array(nearest_neighbors(known, asked))
    assert (got == expected.argmax(axis=1))[decided].all()


def test_of_equally_near_texts_the_first_is_taken() -> None:
    """The same words in any order have the same cosine; what has no word in common with any has 0 with all."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        far, near = [[f"{kind}{n}" for n in rng.integers(20, size=25)] for kind in ("far", "near")]
        known = [" ".join(far), " ".join(near), " ".join(reversed(near)), " ".join(rng.permutation(near)), "near1"]
        assert nearest_neighbors(known, [" ".join(near), " ".join(rng.permutation(near))]) == [1, 1]
    assert nearest_neighbors(["a b", "c d"], ["unheard", "?", "D!"]) == [0, 0, 1]


# What is shown


@pytest.mark.parametrize(
    ("figure", "logged"),
    [
        ("fact recall", "test/fact_recall"),
        ("facts copied", "test/facts_copied"),
        ("form Next steps", "test/form_next_steps"),
        ("ROUGE-L", "test/rouge_l"),
        ("repeated 8-gram", "test/repeated_8_gram"),
        ("eos_rate", "test/eos_rate"),
    ],
)
def test_metrics_have_names_that_a_shell_and_a_logger_take(figure: str, logged: str) -> None:
    assert metric_name(figure) == logged


def test_the_columns_of_the_table_align() -> None:
    """Read back by position: each answerer's means end where its name ends, also where a length ratio is over 10."""
    rows = {
        "fact recall": Interval(0.5, 0.25, 0.75, 8),
        "category a long name of a category": Interval(1.0, 1.0, 1.0, 2),
        "length ratio": Interval(12.345, 10.5, 123.25, 1600),
    }
    columns = {"adapter": rows | {"eos_rate": Interval(0.125, 0.0, 0.25, 8)}, "base": rows, "nearest": rows}
    header, *lines = format_table(columns).splitlines()
    assert len({len(line) for line in [header, *lines]}) == 1
    assert [line[: header.index("adapter")].strip() for line in lines] == list(columns["adapter"])
    for line, (name, cell) in zip(lines, columns["adapter"].items(), strict=True):
        interval, mean = line[header.index("adapter") :].split("]")[0] + "]", f"{cell.mean:.3f}"
        assert interval == f"{mean} [{cell.low:.3f}, {cell.high:.3f}]"
        others = "-" if name == "eos_rate" else mean
        for other in ("base", "nearest"):
            end = header.index(other) + len(other)
            assert line[:end].endswith(f" {others}"), f"{other}:\n{header}\n{line}"
            assert line[end] == " "
        assert int(line.split()[-1]) == cell.records


# Facts in files


def read_facts(path: Path) -> tuple[list[Record], list[str]]:
    records, faults = read_records([str(path)], FieldNames(), needs_response=True, with_facts=True)
    return records, [str(fault) for fault in faults]


def row(**more: Any) -> dict[str, Any]:
    return {"instruction": "Why?", "response": "Because.", **more}


def test_facts_category_and_form_are_read_where_there_are_any(write_jsonl: Jsonl) -> None:
    facts = [
        {"text": "CLM-12", "kind": "copied", "note": "more"},
        {"text": "180 days", "kind": "known"},
    ]
    absent = [row(), row(facts=None), row(facts=""), row(facts=[], category=None, form=3)]
    path = write_jsonl([row(facts=facts, category="bundling", form="next\n steps"), *absent])
    records, faults = read_facts(path)
    assert faults == []
    assert records[0].facts == (Fact("CLM-12", "copied"), Fact("180 days", "known"))
    assert (records[0].category, records[0].form) == ("bundling", "next steps")
    assert [(one.facts, one.category, one.form) for one in records[1:]] == [((), "", "")] * 4


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ("CLM-12", "is a text; expected a list"),
        ({"text": "a", "kind": "b"}, "is an object; expected a list"),
        (0, "is a number; expected a list"),
        ({}, "is an object; expected a list"),
        (["CLM-12"], 'holds "CLM-12"; expected {"text": '),
        ([{"text": "CLM-12"}], 'holds {"text": "CLM-12"}; expected'),
        ([{"text": "fine", "kind": "copied"}, {"text": " ", "kind": "copied"}], 'holds {"text": " ", '),
        ([{"text": 12, "kind": "copied"}], 'holds {"text": 12, '),
        ([{"text": "CLM-12", "kind": None}], '"kind": null}; expected'),
        ([None], "holds null; expected"),
    ],
)
def test_malformed_facts_are_a_fault_with_path_and_line(facts: Any, told: str, write_jsonl: Jsonl) -> None:
    path = write_jsonl([row(), row(facts=facts), row()])
    records, faults = read_facts(path)
    assert len(records) == 2
    assert len(faults) == 1
    assert faults[0].startswith(f"{path}:2: field 'facts' ")
    assert told in faults[0]


# The whole run


@pytest.fixture
def judged(write_jsonl: Jsonl, some_records: Rows) -> Path:
    """Twelve records; those with an input have a fact that stands in it and one that nobody can know."""
    for number, one in enumerate(some_records):
        one["response"] = f"{one['response']} " * 9  # so that no prompt is too long to be an answer
        one["instruction"] += f" {number}"  # no prompt twice
        one["category"] = "even" if number % 2 == 0 else "odd"
        one["form"] = "explain"
        if one["input"]:
            words = one["input"].split()
            one["facts"] = [
                {"text": " ".join(words[:2]), "kind": "copied"},
                {"text": f"fact-{number}", "kind": "known"},
            ]
    return write_jsonl(some_records, "test.jsonl")


@pytest.fixture
def adapter_folder(phi_dir: Path, tmp_path: Path) -> Path:
    """An adapter that was trained enough to say something else."""
    module = new_module(phi_dir)
    assert module.phi is not None
    with torch.no_grad():
        for name, parameter in trainable_parameters(module.phi).items():
            if "lora_B" in name:
                parameter *= 30
    save_adapter(module.trained_adapter(), tmp_path / "trained" / "adapter")
    return tmp_path / "trained" / "adapter"


def new_model(base: Path, **settings: Any) -> LitPhi2:
    """As the CLI makes it: without an adapter, LoRA changes nothing."""
    settings = {"dtype": "float32", "max_new_tokens": 24, "lora_r": 4, "lora_alpha": 8} | settings
    return LitPhi2(base=str(base), **settings)


def run_test(root: Path, model: LitPhi2, train: Path, test: Path, answers: int | None = None) -> Trainer:
    trainer = new_trainer(root)
    data = new_data(Path(model.base), train, test_files=str(test), max_length=400, max_new_tokens=model.max_new_tokens)
    trainer.test(model, data, answers=answers)
    return trainer


def metrics_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "test_metrics.json").read_text())


def answers_of(trainer: Trainer) -> dict[str, list[Completion]]:
    return next(callback.answers for callback in trainer.callbacks if isinstance(callback, TestCompletions))


@pytest.fixture
def ask(phi_dir: Path, judged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Runs the test subcommand in a folder of its own; the training records are those of judged."""
    monkeypatch.chdir(tmp_path)
    settings = {
        "model": {"base": str(phi_dir), "max_new_tokens": 8, "dtype": "float32"},
        "data": {"train_files": judged.name, "test_files": judged.name, "max_length": 400},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings))
    return lambda *arguments: main(["test", "--config", "small.yaml", *arguments])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Every prompt that the model is asked from now on."""
    prompts: list[list[int]] = []
    answer = LitPhi2.generate
    monkeypatch.setattr(LitPhi2, "answer", lambda self, some: prompts.extend(some) or answer(self, some))
    return prompts


def test_without_a_checkpoint_the_base_is_measured_beside_the_baselines(
    phi_dir: Path, judged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is printed is what test_metrics.json holds. By hand: echo has one of a record's two facts, and nearest
    is the reference itself, since the training records are those of the test."""
    run_test(tmp_path, new_model(phi_dir), judged, judged)
    written = metrics_of(tmp_path / "run" / "base")
    answers = written.pop("answers")
    assert list(answers) == ["base", "copy_prompt", "nearest"]
    figures = {"fact recall", "facts copied", "facts known", "form explain", "category odd"}  # no fact in even
    figures |= {"ROUGE-L", "length ratio", "repeated 8-gram"}
    assert set(answers["base"]) == figures | {"eos_rate"}
    assert set(answers["copy_prompt"]) == set(answers["nearest"]) == figures
    assert answers["copy_prompt"]["facts copied"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "records": 6}
    assert answers["copy_prompt"]["fact recall"]["mean"] == 0.5
    assert answers["nearest"]["ROUGE-L"]["mean"] == pytest.approx(1.0)
    logged = {metric_name(name): cell["mean"] for name, cell in answers["base"].items() if name != "category odd"}
    losses = {"test/loss", "test/perplexity", "test/token_accuracy"}
    assert set(written) == set(logged) | losses
    assert {name: written[name] for name in logged} == logged
    printed = capsys.readouterr().out.splitlines()
    for name, value in written.items():
        assert f"{name} {value:.6f}" in printed
    start = next(place for place, line in enumerate(printed) if line.startswith("."))
    assert printed[start].split() == [".", "base", "copy_prompt", "nearest", "records"]
    shown = {line[: printed[start].index("base")].strip() for line in printed[start + 1 :]}
    assert shown == set(answers["base"])


def test_each_answer_is_held_against_its_own_record(
    phi_dir: Path,
    some_records: Rows,
    write_jsonl: Jsonl,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    """Reference: the model asked alone. What it says to a prompt is that record's fact, and is then always found."""
    model = new_model(phi_dir)
    model.configure_model()
    facts = []
    for number, one in enumerate(some_records):
        one["instruction"] += f" {number}"
        prompt = tokenizer(format_prompt(one["instruction"], one["input"]), add_special_tokens=False)["input_ids"]
        text = tokenizer.decode(model.generate([prompt])[0].ids)
        one["response"] = "claim " * 50
        if text.strip():
            facts.append(text)
            one["facts"] = [{"text": text, "kind": "said"}]
    assert len(set(facts)) > 6, "answers differ, so that one of another record would not do"
    path = write_jsonl(some_records, "said.jsonl")
    run_test(tmp_path, model, path, path)
    recall = metrics_of(tmp_path / "run" / "base")["completions"]["base"]["fact recall"]
    assert recall == {"mean": 1.0, "low": 1.0, "high": 1.0, "records": len(facts)}


def test_an_answer_does_not_depend_on_the_batch_it_is_given_in(
    phi_dir: Path,
    judged: Path,
    some_records: Rows,
    tokenizer: PreTrainedTokenizerBase,
    asked: list[list[int]],
    tmp_path: Path,
) -> None:
    """Reference: each prompt alone, tokenized here."""
    model = new_model(phi_dir)
    trainer = run_test(tmp_path, model, judged, judged)
    prompts = [
        tokenizer(format_prompt(one["instruction"], one["input"]), add_special_tokens=False)["input_ids"]
        for one in some_records
    ]
    lengths = [len(prompt) for prompt in asked]
    assert sorted(asked) == sorted(prompts)
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 4
    answers = answers_of(trainer)["base"]
    assert len({tuple(answer.ids) for answer in answers}) > 6
    assert answers == [model.generate([prompt])[0] for prompt in prompts]


def test_with_an_adapter_the_base_answers_too_and_as_it_does_alone(
    phi_dir: Path, judged: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    """Reference: a run without the adapter. Afterwards the adapter is on again."""
    alone = run_test(tmp_path / "alone", new_model(phi_dir), judged, judged)
    model = new_model(phi_dir, adapter=str(adapter_folder))
    both = run_test(tmp_path / "both", model, judged, judged)
    of_base, of_both = (metrics_of(tmp_path / name / "run" / "base") for name in ("alone", "both"))
    assert list(of_both["completions"]) == ["adapter", "base", "copy_prompt", "nearest"]
    assert of_both["completions"]["base"] == of_base["completions"]["base"]
    assert answers_of(both)["base"] == answers_of(alone)["base"]
    assert answers_of(both)["adapter"] != answers_of(both)["base"]
    assert of_both["test/loss"] != of_base["test/loss"]
    for figure in ("rouge_l", "length_ratio", "ends_by_itself"):
        name = next(name for name in of_both["completions"]["adapter"] if metric_name(name) == f"test/{figure}")
        assert of_both[f"test/{figure}"] == of_both["completions"]["adapter"][name]["mean"], "the adapter's"
    prompt = both.datamodule.prompt_batches("test", 1)[0].prompts
    assert model.generate(prompt) == answers_of(both)["adapter"][:1]


def test_with_a_checkpoint_the_figures_lie_beside_it(ask: Ask, adapter_folder: Path, tmp_path: Path) -> None:
    assert ask() == 0
    assert ask("--ckpt_path", str(adapter_folder)) == 0
    of_base, of_both = metrics_of(tmp_path / "runs" / "small" / "base"), metrics_of(adapter_folder)
    assert list(of_base["completions"]) == ["base", "copy_prompt", "nearest"]
    assert list(of_both["completions"]) == ["adapter", "base", "copy_prompt", "nearest"]
    assert of_both["completions"]["base"] == of_base["completions"]["base"]
    assert of_both["completions"]["adapter"] != of_base["completions"]["base"]


def test_answers_0_measures_the_loss_alone_and_asks_nothing(
    ask: Ask, asked: list[list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reference: the loss of a run that answers."""
    folder = tmp_path / "runs" / "small" / "base"
    assert ask("--max_completions", "2") == 0
    whole = metrics_of(folder)
    assert asked
    asked.clear()
    capsys.readouterr()
    assert ask("--max_completions", "0") == 0
    assert asked == []
    losses = {name: whole[name] for name in ("test/loss", "test/perplexity", "test/token_accuracy")}
    assert metrics_of(folder) == losses | {"completions": {}}
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(losses)


def test_answers_2_answers_the_first_two_records(
    phi_dir: Path, judged: Path, asked: list[list[int]], tmp_path: Path
) -> None:
    """Reference: a file that holds no more than these two."""
    first = tmp_path / "first.jsonl"
    first.write_text("".join(judged.read_text().splitlines(keepends=True)[:2]))
    run_test(tmp_path / "two", new_model(phi_dir), judged, judged, answers=2)
    assert len(asked) == 2
    run_test(tmp_path / "whole", new_model(phi_dir), judged, first)
    two, whole = (metrics_of(tmp_path / name / "run" / "base") for name in ("two", "whole"))
    assert two["completions"] == whole["completions"]
    assert two["completions"]["base"]["ROUGE-L"]["records"] == 2
    assert two["completions"]["base"]["fact recall"]["records"] == 1
    assert two["test/loss"] != whole["test/loss"], "the loss is that of all records"


def test_more_answers_than_records_are_all(phi_dir: Path, judged: Path, tmp_path: Path) -> None:
    run_test(tmp_path, new_model(phi_dir), judged, judged, answers=99)
    assert metrics_of(tmp_path / "run" / "base")["completions"]["base"]["ROUGE-L"]["records"] == 12


def test_fewer_than_no_answers_are_refused(
    ask: Ask, phi_dir: Path, judged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="--max_completions -1: is less than 0"):
        run_test(tmp_path, new_model(phi_dir), judged, judged, answers=-1)
    assert ask("--max_completions", "-1") == 2
    assert "--max_completions -1: is less than 0" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_malformed_facts_stop_a_test_before_anything_is_asked(
    ask: Ask, asked: list[list[int]], judged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = judged.read_text().splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | {"facts": "CLM-12"})
    judged.write_text("\n".join(lines) + "\n")
    assert ask() == 2
    assert f"{judged.name}:3: field 'facts' is a text" in capsys.readouterr().err
    assert asked == []
    assert ask("--data.on_bad_record", "skip") == 0
    assert metrics_of(Path("runs/small/base"))["completions"]["base"]["ROUGE-L"]["records"] == 11


def test_facts_in_a_training_file_are_not_looked_at(
    phi_dir: Path, judged: Path, some_records: Rows, write_jsonl: Jsonl, tmp_path: Path
) -> None:
    train = write_jsonl([one | {"facts": "malformed"} for one in some_records], "train.jsonl")
    data = new_data(phi_dir, train, max_length=400)
    data.setup("fit")
    assert len(data.splits["train"].records) == len(data.splits["val"].records) == 12
    run_test(tmp_path, new_model(phi_dir), train, judged)
    assert "nearest" in metrics_of(tmp_path / "run" / "base")["completions"]


def test_records_without_facts_are_judged_by_all_that_needs_none(
    phi_dir: Path, some_records: Rows, write_jsonl: Jsonl, tmp_path: Path
) -> None:
    path = write_jsonl(some_records)
    run_test(tmp_path, new_model(phi_dir), path, path)
    rows = metrics_of(tmp_path / "run" / "base")["completions"]["base"]
    assert list(rows) == ["ROUGE-L", "length ratio", "repeated 8-gram", "eos_rate"]


@pytest.mark.parametrize("content", [None, '{"instruction": "Why?"}\n'])
def test_without_training_records_nearest_is_left_out_with_a_warning(
    content: str | None,
    phi_dir: Path,
    judged: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Reference: the rest is what it is with them. There is no file, or no record in it that can be used."""
    monkeypatch.setattr(logging.getLogger("lit_phi2"), "propagate", True)  # off once a test before has run the CLI
    train = tmp_path / "train.jsonl"
    if content is not None:
        train.write_text(content)
    run_test(tmp_path / "without", new_model(phi_dir), train, judged)
    warned = [line.getMessage() for line in caplog.records if line.levelno == logging.WARNING]
    assert any("nearest" in message and str(train) in message for message in warned)
    run_test(tmp_path / "with", new_model(phi_dir), judged, judged)
    without, whole = (metrics_of(tmp_path / name / "run" / "base") for name in ("without", "with"))
    assert list(without["completions"]) == ["base", "copy_prompt"]
    del whole["completions"]["nearest"]
    assert without == whole


def test_a_missing_training_file_does_not_fail_the_command(ask: Ask, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask("--data.train_files", "nowhere.jsonl") == 0
    assert "left out of the baselines: nowhere.jsonl: no such file" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_asked(
    ask: Ask, asked: list[list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").write_text("a file")
    assert ask() == 2
    assert "runs/small/base/test_metrics.json: cannot be written" in capsys.readouterr().err
    assert asked == []


def test_answers_that_would_run_past_the_positions_of_the_base_are_refused_before_anything_is_asked(
    ask: Ask, asked: list[list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    """The small base has 512 positions. The loss alone needs no room for an answer."""
    assert ask("--model.max_new_tokens", "500") == 2
    assert "model.max_new_tokens: 500 after the " in capsys.readouterr().err
    assert asked == []
    assert ask("--model.max_new_tokens", "500", "--max_completions", "0") == 0
