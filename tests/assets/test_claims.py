"""The packaged claims: what their README states, checked from the files alone."""

import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from lit_phi2.data.prompts import HEADERS
from lit_phi2.data.records import Fact
from lit_phi2.data.sources import CLAIMS_DIR
from lit_phi2.evaluation.baselines import nearest_neighbors
from lit_phi2.evaluation.metrics import match_facts

SCRIPTS = Path(__file__).parents[2] / "scripts"
SPLITS = ("train", "validation", "test")
FIELDS = ["id", "category", "form", "scenario", "skeleton", "instruction", "input", "response", "facts"]
OTHER_LINES = {
    "auto damage",
    "auto injury",
    "property damage",
    "property theft",
    "life claim",
    "disability income",
    "travel cancellation",
    "travel medical",
}
# Days for the first appeal by kind of plan, where federal rules set them; in all other records the notice states them.
FEDERAL_DAYS = {
    "employer plan": 180,  # 29 CFR 2560.503-1(h)(3)(i)
    "marketplace plan": 180,  # 45 CFR 147.136(b)(3)
    "Medicare Advantage": 65,  # 42 CFR 422.582(b), since 2025
    "Medicaid plan": 60,  # 42 CFR 438.402(c)(2)(ii)
    "group life": 60,  # 29 CFR 2560.503-1(h)(2)(i)
    "group disability": 180,  # 29 CFR 2560.503-1(h)(3)(i) and (h)(4)
}
DATE = re.compile(r"[A-Z][a-z]+ \d{1,2}, \d{4}")
BILLED_AND_PAID = re.compile(r"(?:Billed:|Charge|Amount) \$([\d,.]+\d)[,;]? +(?:Paid:|plan payment|paid) \$([\d,.]+\d)")
# A header of the template, or a line that resembles one.
HEADER_LIKE = re.compile(r"##|^\W*(?:instruction|input|response)s?\s*:", re.IGNORECASE | re.MULTILINE)

Record = dict[str, Any]
Splits = dict[str, list[Record]]


def read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def splits() -> Splits:
    return {split: read(CLAIMS_DIR / f"{split}.jsonl") for split in SPLITS}


@pytest.fixture(scope="module")
def records(splits: Splits) -> list[Record]:
    """The records of all three splits."""
    return [record for split in SPLITS for record in splits[split]]


def is_gold(record: Record) -> bool:
    return record["scenario"].startswith("gold")


def composed(records: Iterable[Record]) -> list[Record]:
    """The records composed by scripts/build_claims.py; gold records were written by hand."""
    return [record for record in records if not is_gold(record)]


def normalize(text: str) -> str:
    return re.sub(r"\s+", " ", text).lower()


def prompt(record: Record) -> str:
    return record["instruction"] + "\n" + record["input"]


def fact_texts(record: Record, kind: str) -> list[str]:
    return [fact["text"] for fact in record["facts"] if fact["kind"] == kind]


def fraction(records: list[Record], predicate: Callable[[Record], object]) -> float:
    return sum(1 for record in records if predicate(record)) / len(records)


def ngrams(text: str) -> set[tuple[str, ...]]:
    """The word 8-grams, in lower case."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[start : start + 8]) for start in range(len(words) - 7)}


def index_ngrams(texts: list[set[tuple[str, ...]]]) -> dict[tuple[str, ...], list[int]]:
    """8-gram -> the indices of the texts that contain it."""
    index: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, text_ngrams in enumerate(texts):
        for ngram in text_ngrams:
            index[ngram].append(number)
    return index


def repeated(values: Iterable[str]) -> list[str]:
    return [value for value, count in Counter(values).items() if count > 1]


# Contents


def test_splits_have_at_least_4000_400_and_400_records(splits: Splits) -> None:
    assert len(splits["train"]) >= 4000
    assert len(splits["validation"]) >= 400
    assert len(splits["test"]) >= 400


def test_every_record_has_exactly_the_stated_fields(records: list[Record]) -> None:
    for record in records:
        assert list(record) == FIELDS
        assert all(isinstance(record[field], str) for field in FIELDS[:-1])
        assert all(record[field].strip() for field in FIELDS[:-1] if field != "input")
        assert all(list(fact) == ["text", "kind"] for fact in record["facts"])


def test_ids_are_unique_over_all_splits(records: list[Record]) -> None:
    assert repeated(record["id"] for record in records) == []


def test_no_two_prompts_are_equal(records: list[Record]) -> None:
    """Over all splits, and without regard to case and white space."""
    assert repeated(normalize(prompt(record)) for record in records) == []


def test_every_split_has_the_same_categories_at_least_20(splits: Splits) -> None:
    train, validation, test = ({record["category"] for record in splits[split]} for split in SPLITS)
    assert len(train) >= 20
    assert train == validation == test


@pytest.mark.parametrize("split", SPLITS)
def test_each_of_three_forms_is_at_least_a_quarter(split: str, splits: Splits) -> None:
    counts = Counter(record["form"] for record in splits[split])
    assert counts.keys() == {"explain", "draft", "require"}
    assert min(counts.values()) >= len(splits[split]) / 4


@pytest.mark.parametrize("split", SPLITS)
def test_at_least_a_tenth_is_not_health_insurance(split: str, splits: Splits) -> None:
    others = Counter(record["category"] for record in splits[split] if record["category"] in OTHER_LINES)
    assert others.keys() == OTHER_LINES
    assert others.total() >= len(splits[split]) / 10


@pytest.mark.parametrize("split", SPLITS)
def test_at_least_half_have_an_input_section(split: str, splits: Splits) -> None:
    assert fraction(splits[split], lambda record: record["input"]) >= 0.5


@pytest.mark.parametrize("split", SPLITS)
def test_prompts_are_written_in_many_voices(split: str, splits: Splits) -> None:
    """Each voice in at least 5 % of the prompts, and no two words open more than 10 %.

    A word is misspelt if it occurs in no input and no response, but does with two neighbouring letters swapped.
    """
    vocabulary = {
        word
        for record in splits[split]
        for word in re.findall(r"[a-z]+", (record["input"] + " " + record["response"]).lower())
    }

    def misspelt(record: Record) -> bool:
        words = [word for word in re.findall(r"\b[a-z]{5,}\b", record["instruction"]) if word not in vocabulary]
        return any(w[:n] + w[n + 1] + w[n] + w[n + 2 :] in vocabulary for w in words for n in range(len(w) - 1))

    def matches(pattern: str) -> Callable[[Record], object]:
        return lambda record: re.search(pattern, prompt(record))

    voices: dict[str, Callable[[Record], object]] = {
        "lower case": lambda record: record["instruction"][0].islower(),
        "polite": lambda record: re.search("(?i)please|thank|grateful", record["instruction"]),
        "question": lambda record: "?" in record["instruction"],
        "statement": lambda record: "?" not in record["instruction"],
        "misspelt": misspelt,
        "short": lambda record: len(prompt(record).split()) < 60,
        "long": lambda record: len(prompt(record).split()) > 80,
        "for the writer": matches(r"My name is|This is [A-Z]|I am [A-Z]"),
        "for someone else": matches(r"Our (?:patient|client)|We bill for|Patient:|On behalf of"),
        "explanation of benefits": matches(r"(?i)not a bill|explanation of benefits|statement of"),
        "letter": matches(r"Dear |NOTICE OF DECISION"),
        "note": matches(r"(?:Call|Claim) note|\nFile "),
    }
    fractions = {name: fraction(splits[split], predicate) for name, predicate in voices.items()}
    assert {name: value for name, value in fractions.items() if value < 0.05} == {}
    openings = Counter(tuple(record["instruction"].lower().split()[:2]) for record in splits[split])
    assert openings.most_common(1)[0][1] <= len(splits[split]) / 10


def test_no_text_resembles_a_header_of_the_template(records: list[Record]) -> None:
    assert all(HEADER_LIKE.search(f"Some text.\n{header}\nmore") for header in HEADERS)
    for record in records:
        for text in (*(record[field] for field in FIELDS[:-1]), *(fact["text"] for fact in record["facts"])):
            assert not HEADER_LIKE.search(text), record["id"]


# Facts


def test_every_fact_is_in_its_response(records: list[Record]) -> None:
    for record in records:
        response = normalize(record["response"])
        for fact in record["facts"]:
            assert fact["kind"] in ("copied", "known", "reasoned"), record["id"]
            assert len(normalize(fact["text"]).strip()) >= 4, record["id"]
            assert normalize(fact["text"]) in response, record["id"]


def test_copied_facts_and_no_others_are_in_the_prompt(records: list[Record]) -> None:
    for record in records:
        prompt_text = normalize(prompt(record))
        for fact in record["facts"]:
            assert (normalize(fact["text"]) in prompt_text) == (fact["kind"] == "copied"), (record["id"], fact)


def test_every_record_has_copied_and_known_facts(records: list[Record]) -> None:
    for record in records:
        assert fact_texts(record, "copied"), record["id"]
        assert fact_texts(record, "known"), record["id"]


def test_only_known_facts_are_in_over_a_twentieth_of_responses(splits: Splits) -> None:
    """So that a copied or reasoned fact cannot be matched by text that suits every prompt."""
    responses = [normalize(record["response"]) for record in splits["train"]]
    kinds: dict[str, set[str]] = defaultdict(set)
    for record in splits["train"]:
        for fact in record["facts"]:
            kinds[normalize(fact["text"])].add(fact["kind"])
    lengths: dict[str, set[int]] = defaultdict(set)  # first four characters of a fact -> lengths of such facts
    for text in kinds:
        lengths[text[:4]].add(len(text))
    counts: Counter[str] = Counter()
    for response in responses:
        starts = range(len(response))
        candidates = {response[at : at + length] for at in starts for length in lengths.get(response[at : at + 4], ())}
        counts.update(candidates & kinds.keys())
    frequent = {text for text, count in counts.items() if count > len(responses) / 20}
    assert frequent, "some known facts are, such as the next level of review of a kind of plan"
    assert {text: kinds[text] for text in frequent if kinds[text] != {"known"}} == {}


def deadline(record: Record) -> str:
    """The date of the notice plus the days of the federal rule or, where there is none, of the notice."""
    [notice_date] = [text for text in fact_texts(record, "copied") if DATE.fullmatch(text)]
    days = FEDERAL_DAYS.get(record["scenario"].split(" | ")[2])
    if days is None:
        [stated] = re.findall(r"within (\d+) days of this notice", normalize(prompt(record)))
        days = int(stated)
    last: date = datetime.strptime(notice_date, "%B %d, %Y").date() + timedelta(days=days)
    return f"{last:%B} {last.day}, {last.year}"


def test_reasoned_dates_are_the_notice_date_plus_the_days(records: list[Record]) -> None:
    """Reference: datetime and the regulations. Every composed explanation has one reasoned date."""
    explanations = [record for record in composed(records) if record["form"] == "explain"]
    assert len(explanations) >= 1000
    for record in explanations:
        dates = [text for text in fact_texts(record, "reasoned") if DATE.fullmatch(text)]
        assert dates == [deadline(record)], record["id"]


def test_the_days_of_a_federal_limit_are_known_facts(records: list[Record]) -> None:
    """The notice states all other limits, so they are not known facts."""
    explanations = [record for record in composed(records) if record["form"] == "explain"]
    assert {record["scenario"].split(" | ")[2] for record in explanations} > FEDERAL_DAYS.keys()
    for record in explanations:
        days = FEDERAL_DAYS.get(record["scenario"].split(" | ")[2])
        stated = [text for text in fact_texts(record, "known") if re.fullmatch(r"\d+ days", text)]
        assert stated == ([f"{days} days"] if days else []), record["id"]


def test_reasoned_amounts_are_billed_minus_paid(records: list[Record]) -> None:
    """Reference: the two amounts of the input, in cents. A composed record has no other reasoned amount."""
    num_amounts = 0
    for record in composed(records):
        expected = []
        if record["form"] == "explain" and (amounts := BILLED_AND_PAID.search(record["input"])):
            billed, paid = (int(re.sub("[,.]", "", text)) for text in amounts.groups())
            expected = [f"${(billed - paid) // 100:,}.{(billed - paid) % 100:02}"] if paid else []
            num_amounts += len(expected)
        assert [text for text in fact_texts(record, "reasoned") if not DATE.fullmatch(text)] == expected, record["id"]
    assert num_amounts >= 100


# Skeletons and scenarios


def masked(record: Record) -> str:
    """The response in one line, with facts, capitalized words and numbers replaced by "_"."""
    text = re.sub(r"\s+", " ", record["response"])
    for fact in sorted((re.sub(r"\s+", " ", fact["text"]) for fact in record["facts"]), key=len, reverse=True):
        text = re.sub(re.escape(fact), " _ ", text, flags=re.IGNORECASE)
    text = re.sub(r"\b[A-Z]\w*|\S*\d\S*", " _ ", text)
    return re.sub(r"_[\W_]*", "_ ", text)


def test_training_has_at_least_150_skeletons(splits: Splits) -> None:
    assert len({record["skeleton"] for record in composed(splits["train"])}) >= 150


def test_responses_of_different_skeletons_are_worded_differently(splits: Splits) -> None:
    """Of any two masked responses, less than half of the 8-grams of the shorter are shared."""
    train = composed(splits["train"])
    texts = [ngrams(masked(record)) for record in train]
    index = index_ngrams(texts)
    assert all(texts)
    for number, text_ngrams in enumerate(texts):
        shared = Counter(other for ngram in text_ngrams for other in index[ngram] if other < number)
        for other, count in shared.items():
            if train[other]["skeleton"] != train[number]["skeleton"]:
                ids = train[number]["id"], train[other]["id"]
                assert count < min(len(text_ngrams), len(texts[other])) / 2, ids


def test_no_scenario_is_in_two_splits(splits: Splits) -> None:
    train, validation, test = ({record["scenario"] for record in splits[split]} for split in SPLITS)
    assert train & validation == train & test == validation & test == set()


@pytest.mark.parametrize("split", ["validation", "test"])
def test_held_out_scenarios_recombine_parts_of_training(split: str, splits: Splits) -> None:
    """A scenario is `category | case | kind of plan`."""
    kinds: dict[tuple[str, str], set[str]] = defaultdict(set)
    for record in composed(splits["train"]):
        category, case, kind = record["scenario"].split(" | ")
        kinds[category, case].add(kind)
    held_out = {record["scenario"] for record in composed(splits[split])}
    assert len(held_out) >= 50
    for scenario in held_out:
        category, case, kind = scenario.split(" | ")
        assert kinds[category, case], f"the case of {scenario} is not in training"
        assert kind not in kinds[category, case], f"{scenario} is in training"


def test_test_responses_are_not_near_copies_of_training(splits: Splits) -> None:
    index = index_ngrams([ngrams(record["response"]) for record in splits["train"]])
    too_similar = {}
    for record in splits["test"]:
        response_ngrams = ngrams(record["response"])
        shared = Counter(number for ngram in response_ngrams for number in index.get(ngram, ()))
        number, count = max(shared.items(), key=lambda item: item[1], default=(0, 0))
        if not response_ngrams or count > len(response_ngrams) / 2:
            too_similar[record["id"]] = f"{count} of {len(response_ngrams)} in {splits['train'][number]['id']}"
    assert too_similar == {}


# The dataset card


def card_rows(name: str) -> list[list[str]]:
    """The cells of the README's table rows that start with a name in code style."""
    lines = (CLAIMS_DIR / "README.md").read_text("utf-8").splitlines()
    rows = [[cell.strip().replace(",", "") for cell in line.split("|")[1:-1]] for line in lines]
    return [row for row in rows if row and row[0] == f"`{name}`"]


@pytest.mark.parametrize("split", SPLITS)
def test_the_dataset_card_states_the_counts_of_the_files(split: str, splits: Splits) -> None:
    records = splits[split]
    forms = Counter(record["form"] for record in records)
    counts = [
        len(records),
        sum(map(is_gold, records)),
        *(forms[form] for form in ("explain", "draft", "require")),
        sum(1 for record in records if record["input"]),
        len({record["scenario"] for record in records}),
    ]
    assert card_rows(f"{split}.jsonl") == [[f"`{split}.jsonl`", *map(str, counts)]]
    for kind in ("copied", "known", "reasoned"):
        [row] = card_rows(kind)
        assert row[2 + SPLITS.index(split)] == str(sum(len(fact_texts(record, kind)) for record in records))
    assert {6 <= len(record["facts"]) <= 11 for record in records} == {True}
    per_category = Counter(record["category"] for record in composed(records))
    assert set(per_category.values()) == {150 if split == "train" else 14}
    if split != "train":
        scenarios = {(record["category"], record["scenario"]) for record in composed(records)}
        assert set(Counter(category for category, _ in scenarios).values()) == {3}


def test_the_dataset_card_names_every_category(records: list[Record]) -> None:
    card = normalize((CLAIMS_DIR / "README.md").read_text("utf-8"))
    assert [name for name in {record["category"] for record in records} if name not in card] == []
    assert f"the {len({record['category'] for record in records})} below" in card


def test_the_dataset_card_states_the_baselines_fact_recall(splits: Splits) -> None:
    train, test = splits["train"], splits["test"]
    nearest = nearest_neighbors([prompt(record) for record in train], [prompt(record) for record in test])
    completions = {"copy": map(prompt, test), "nearest": (train[index]["response"] for index in nearest)}
    recall = {}
    for name, texts in completions.items():
        recalls = []
        for record, text in zip(test, texts, strict=True):
            facts = [Fact(**fact) for fact in record["facts"]]
            recalls.append(sum(match_facts(facts, text, record["response"])) / len(facts))
        recall[name] = sum(recalls) / len(recalls)
    card = normalize((CLAIMS_DIR / "README.md").read_text("utf-8"))
    assert f"copying the prompt matches {recall['copy']:.3f} of" in card
    assert f"the response of the nearest training record {recall['nearest']:.3f}." in card


# Gold


def test_gold_records_cover_all_categories_and_30_are_in_test(splits: Splits, records: list[Record]) -> None:
    gold = [record for record in records if is_gold(record)]
    assert len(gold) >= 60
    assert {record["category"] for record in gold} == {record["category"] for record in records}
    assert sum(map(is_gold, splits["test"])) == 30


def test_gold_responses_share_no_8_gram_with_composed_ones(records: list[Record]) -> None:
    gold_ngrams = set().union(*(ngrams(record["response"]) for record in records if is_gold(record)))
    assert gold_ngrams
    for record in composed(records):
        assert not ngrams(record["response"]) & gold_ngrams, record["id"]


def test_the_gold_file_equals_the_gold_records_of_test(splits: Splits) -> None:
    def by_id(records: list[Record]) -> list[Record]:
        return sorted(records, key=lambda record: record["id"])

    assert by_id(read(CLAIMS_DIR / "gold.jsonl")) == by_id([record for record in splits["test"] if is_gold(record)])


# The build programs


def run(script: str, *arguments: str) -> None:
    """In a new process, so that no state is shared, not even the hash seed that orders sets."""
    done = subprocess.run([sys.executable, str(SCRIPTS / script), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_build_program_reproduces_the_packaged_bytes(tmp_path: Path) -> None:
    """With its default seed."""
    run("build_claims.py", "--output_dir", str(tmp_path))
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written.keys() == {path.name for path in CLAIMS_DIR.glob("*.jsonl")}
    assert written.keys() == {*(f"{split}.jsonl" for split in SPLITS), "gold.jsonl"}
    assert [name for name in written if written[name] != (CLAIMS_DIR / name).read_bytes()] == []


def test_another_seed_gives_other_records(tmp_path: Path) -> None:
    run("build_claims.py", "--output_dir", str(tmp_path), "--seed", "1")
    for split in SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() != (CLAIMS_DIR / f"{split}.jsonl").read_bytes()


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """File -> its documents, one megabyte in total."""
    folder = tmp_path_factory.mktemp("prose")
    run("build_claims_prose.py", "--output_dir", str(folder), "--megabytes", "1")
    return {path.stem: path.read_text("utf-8").split("\n<|endoftext|>\n") for path in folder.iterdir()}


def test_prose_never_resembles_the_template(prose: dict[str, list[str]]) -> None:
    assert sum(len(document) for documents in prose.values() for document in documents) > 900_000
    for name, documents in prose.items():
        for document in documents:
            assert not HEADER_LIKE.search(document), name


def test_prose_names_no_held_out_pair_of_service_and_plan(prose: dict[str, list[str]], splits: Splits) -> None:
    """No passage names a service and a kind of plan that only validation or test combine.

    Plans and services are found by the names in the records; the name of a plan is a house and a name of its kind. A
    claim file or a page of questions is one passage, since it is about one case; a guide covers several cases, one per
    line. Some services occur in two categories: a pair that training has in either one is not held out.
    """
    train, held_out = (
        {tuple(record["scenario"].split(" | ")[1:]) for name in names for record in composed(splits[name])}
        for names in (["train"], ["validation", "test"])
    )
    held_out -= train
    assert len(held_out) >= 100
    kinds, houses = {}, set()
    for record in composed(splits["train"]):
        house, kind_name = record["facts"][0]["text"].split(" ", 1)
        houses.add(house)
        kinds[kind_name.lower()] = record["scenario"].split(" | ")[2]
    # The longest first, so that "left wrist X-ray" does not match as "wrist X-ray".
    services = {service.lower(): service for service, _ in sorted(train | held_out, key=lambda pair: -len(pair[0]))}
    service = re.compile(r"\b(" + "|".join(map(re.escape, services)) + r")\b")
    plan = re.compile(rf"(?i)\b(?:{'|'.join(houses)}) ({'|'.join(map(re.escape, kinds))})\b")

    passages = prose["claims_files"] + prose["claims_questions"]
    passages += [line for guide in prose["claims_guides"] for line in guide.splitlines()]
    named: Counter[tuple[str, str]] = Counter()
    for passage in map(str.lower, passages):
        for service_name in set(service.findall(passage)):
            for kind_name in set(plan.findall(passage)):
                named[services[service_name], kinds[kind_name]] += 1
    assert len(named.keys() & train) >= 300
    assert {pair: count for pair, count in named.items() if pair in held_out} == {}
