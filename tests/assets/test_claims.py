"""The packaged claims: what is promised of them, read from the files alone."""

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
from lit_phi2.data.sources import CLAIMS

SCRIPTS = Path(__file__).parents[2] / "scripts"
SPLITS = ("train", "validation", "test")
FIELDS = ["id", "category", "form", "scenario", "skeleton", "instruction", "input", "response", "facts"]
NOT_HEALTH = {
    "auto damage",
    "auto injury",
    "property damage",
    "property theft",
    "life claim",
    "disability income",
    "travel cancellation",
    "travel medical",
}
# The first review of kinds of plan with a federal limit; for all others the notice states the days.
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
# A header of the template, or what a careless reader of the template would take for one.
LIKE_A_HEADER = re.compile(r"##|^\W*(?:instruction|input|response)s?\s*:", re.IGNORECASE | re.MULTILINE)

Record = dict[str, Any]
Splits = dict[str, list[Record]]


def read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def splits() -> Splits:
    return {split: read(CLAIMS / f"{split}.jsonl") for split in SPLITS}


@pytest.fixture(scope="module")
def records(splits: Splits) -> list[Record]:
    """Of all three splits."""
    return [record for split in SPLITS for record in splits[split]]


def is_gold(record: Record) -> bool:
    return record["scenario"].startswith("gold")


def composed(records: Iterable[Record]) -> list[Record]:
    """Those that the build program composed; gold records were written by hand."""
    return [record for record in records if not is_gold(record)]


def folded(text: str) -> str:
    return re.sub(r"\s+", " ", text).lower()


def prompt(record: Record) -> str:
    return record["instruction"] + "\n" + record["input"]


def texts(record: Record, kind: str) -> list[str]:
    """Of the facts of one kind."""
    return [fact["text"] for fact in record["facts"] if fact["kind"] == kind]


def share(records: list[Record], holds: Callable[[Record], object]) -> float:
    return sum(1 for record in records if holds(record)) / len(records)


def runs(text: str) -> set[tuple[str, ...]]:
    """The 8-grams: eight words one after the other, in lower case."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[start : start + 8]) for start in range(len(words) - 7)}


def holders(found: list[set[tuple[str, ...]]]) -> dict[tuple[str, ...], list[int]]:
    """8-gram -> the texts that hold it."""
    index: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, own in enumerate(found):
        for run in own:
            index[run].append(number)
    return index


# What is there


def test_the_splits_hold_4000_and_400_and_400_records(splits: Splits) -> None:
    assert len(splits["train"]) >= 4000
    assert len(splits["validation"]) >= 400
    assert len(splits["test"]) >= 400


def test_every_record_has_exactly_the_promised_fields(records: list[Record]) -> None:
    for record in records:
        assert list(record) == FIELDS
        assert all(isinstance(record[field], str) for field in FIELDS[:-1])
        assert all(record[field].strip() for field in FIELDS[:-1] if field != "input")
        assert all(list(fact) == ["text", "kind"] for fact in record["facts"])


def test_ids_are_unique_over_all_splits(records: list[Record]) -> None:
    assert [some for some, count in Counter(record["id"] for record in records).items() if count > 1] == []


def test_no_two_prompts_are_equal(records: list[Record]) -> None:
    """Over all splits, and case and white space do not make a difference."""
    assert [some for some, count in Counter(folded(prompt(record)) for record in records).items() if count > 1] == []


def test_at_least_twenty_categories_stand_in_every_split(splits: Splits) -> None:
    found = [{record["category"] for record in splits[split]} for split in SPLITS]
    assert len(found[0]) >= 20
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("split", SPLITS)
def test_each_of_three_forms_is_at_least_a_quarter(split: str, splits: Splits) -> None:
    counts = Counter(record["form"] for record in splits[split])
    assert counts.keys() == {"explain", "draft", "require"}
    assert min(counts.values()) >= len(splits[split]) / 4


@pytest.mark.parametrize("split", SPLITS)
def test_at_least_a_tenth_is_of_lines_other_than_health(split: str, splits: Splits) -> None:
    others = Counter(record["category"] for record in splits[split] if record["category"] in NOT_HEALTH)
    assert others.keys() == NOT_HEALTH
    assert others.total() >= len(splits[split]) / 10


@pytest.mark.parametrize("split", SPLITS)
def test_at_least_half_have_an_input_section(split: str, splits: Splits) -> None:
    assert share(splits[split], lambda record: record["input"]) >= 0.5


@pytest.mark.parametrize("split", SPLITS)
def test_prompts_come_in_many_voices(split: str, splits: Splits) -> None:
    """Each voice in at least a twentieth, and no two words open more than a tenth.

    Misspelt is a word that occurs nowhere in inputs and responses, but does with two neighbouring letters exchanged.
    """
    known = {
        word
        for record in splits[split]
        for word in re.findall(r"[a-z]+", (record["input"] + " " + record["response"]).lower())
    }

    def misspelt(record: Record) -> bool:
        words = [word for word in re.findall(r"\b[a-z]{5,}\b", record["instruction"]) if word not in known]
        return any(w[:n] + w[n + 1] + w[n] + w[n + 2 :] in known for w in words for n in range(len(w) - 1))

    def saying(pattern: str) -> Callable[[Record], object]:
        return lambda record: re.search(pattern, prompt(record))

    voices: dict[str, Callable[[Record], object]] = {
        "lower case": lambda record: record["instruction"][0].islower(),
        "polite": lambda record: re.search("(?i)please|thank|grateful", record["instruction"]),
        "asking": lambda record: "?" in record["instruction"],
        "telling": lambda record: "?" not in record["instruction"],
        "misspelt": misspelt,
        "short": lambda record: len(prompt(record).split()) < 60,
        "long": lambda record: len(prompt(record).split()) > 80,
        "for oneself": saying(r"My name is|This is [A-Z]|I am [A-Z]"),
        "for another": saying(r"Our (?:patient|client)|We bill for|Patient:|On behalf of"),
        "a statement": saying(r"(?i)not a bill|explanation of benefits|statement of"),
        "a letter": saying(r"Dear |NOTICE OF DECISION"),
        "a note": saying(r"(?:Call|Claim) note|\nFile "),
    }
    shares = {name: share(splits[split], holds) for name, holds in voices.items()}
    assert {name: found for name, found in shares.items() if found < 0.05} == {}
    openings = Counter(tuple(record["instruction"].lower().split()[:2]) for record in splits[split])
    assert openings.most_common(1)[0][1] <= len(splits[split]) / 10


def test_no_text_looks_like_a_header_of_the_template(records: list[Record]) -> None:
    assert all(LIKE_A_HEADER.search(f"Some text.\n{header}\nmore") for header in HEADERS)
    for record in records:
        for text in (*(record[field] for field in FIELDS[:-1]), *(fact["text"] for fact in record["facts"])):
            assert not LIKE_A_HEADER.search(text), record["id"]


# Facts


def test_every_fact_stands_in_its_response(records: list[Record]) -> None:
    for record in records:
        response = folded(record["response"])
        for fact in record["facts"]:
            assert fact["kind"] in ("copied", "known", "reasoned"), record["id"]
            assert len(folded(fact["text"]).strip()) >= 4, record["id"]
            assert folded(fact["text"]) in response, record["id"]


def test_copied_facts_and_no_others_stand_in_the_prompt(records: list[Record]) -> None:
    for record in records:
        asked = folded(prompt(record))
        for fact in record["facts"]:
            assert (folded(fact["text"]) in asked) == (fact["kind"] == "copied"), (record["id"], fact)


def test_every_record_has_copied_and_known_facts(records: list[Record]) -> None:
    for record in records:
        assert texts(record, "copied"), record["id"]
        assert texts(record, "known"), record["id"]


def test_only_known_facts_stand_in_more_than_a_twentieth_of_the_training_responses(splits: Splits) -> None:
    """So what is copied or reasoned cannot be had by saying what is always said."""
    responses = [folded(record["response"]) for record in splits["train"]]
    kinds: dict[str, set[str]] = defaultdict(set)
    for record in splits["train"]:
        for fact in record["facts"]:
            kinds[folded(fact["text"])].add(fact["kind"])
    lengths: dict[str, set[int]] = defaultdict(set)  # first four letters of a fact -> how long such facts are
    for text in kinds:
        lengths[text[:4]].add(len(text))
    counts: Counter[str] = Counter()
    for response in responses:
        places = range(len(response))
        found = {response[at : at + length] for at in places for length in lengths.get(response[at : at + 4], ())}
        counts.update(found & kinds.keys())
    frequent = {text for text, count in counts.items() if count > len(responses) / 20}
    assert frequent  # some known ones, as the words by which a kind of plan is reviewed
    assert {text: kinds[text] for text in frequent if kinds[text] != {"known"}} == {}


def deadline(record: Record) -> str:
    """Counted from the notice, by the days of the plan's rule or, where there is none, those of the notice."""
    [told] = [text for text in texts(record, "copied") if DATE.fullmatch(text)]
    days = FEDERAL_DAYS.get(record["scenario"].split(" | ")[2])
    if days is None:
        [stated] = re.findall(r"within (\d+) days of this notice", folded(prompt(record)))
        days = int(stated)
    last: date = datetime.strptime(told, "%B %d, %Y").date() + timedelta(days=days)
    return f"{last:%B} {last.day}, {last.year}"


def test_reasoned_dates_are_the_notice_date_plus_the_days(records: list[Record]) -> None:
    """Reference: datetime, and the limits of the regulations. Every composed explanation reasons one date."""
    explained = [record for record in composed(records) if record["form"] == "explain"]
    assert len(explained) >= 1000
    for record in explained:
        assert [text for text in texts(record, "reasoned") if DATE.fullmatch(text)] == [deadline(record)], record["id"]


def test_the_days_of_a_federal_limit_are_known_facts(records: list[Record]) -> None:
    """All other limits are told by the notice, and so are not to be known."""
    explained = [record for record in composed(records) if record["form"] == "explain"]
    assert {record["scenario"].split(" | ")[2] for record in explained} > FEDERAL_DAYS.keys()
    for record in explained:
        days = FEDERAL_DAYS.get(record["scenario"].split(" | ")[2])
        stated = [text for text in texts(record, "known") if re.fullmatch(r"\d+ days", text)]
        assert stated == ([f"{days} days"] if days else []), record["id"]


def test_reasoned_sums_are_what_is_billed_less_what_is_paid(records: list[Record]) -> None:
    """Reference: the two sums as the input shows them, in cents. A composed record reasons no other sum."""
    shown = 0
    for record in composed(records):
        left = []
        if record["form"] == "explain" and (sums := BILLED_AND_PAID.search(record["input"])):
            billed, paid = (int(re.sub("[,.]", "", text)) for text in sums.groups())
            left = [f"${(billed - paid) // 100:,}.{(billed - paid) % 100:02}"] if paid else []
            shown += len(left)
        assert [text for text in texts(record, "reasoned") if not DATE.fullmatch(text)] == left, record["id"]
    assert shown >= 100


# Skeletons and scenarios


def masked(record: Record) -> str:
    """The response without its facts, capitalized words and numbers, in one line."""
    text = re.sub(r"\s+", " ", record["response"])
    for fact in sorted((re.sub(r"\s+", " ", fact["text"]) for fact in record["facts"]), key=len, reverse=True):
        text = re.sub(re.escape(fact), " _ ", text, flags=re.IGNORECASE)
    text = re.sub(r"\b[A-Z]\w*|\S*\d\S*", " _ ", text)
    return re.sub(r"_[\W_]*", "_ ", text)


def test_training_has_at_least_150_skeletons(splits: Splits) -> None:
    assert len({record["skeleton"] for record in composed(splits["train"])}) >= 150


def test_responses_of_different_skeletons_are_worded_differently(splits: Splits) -> None:
    """Less than half of the 8-grams of the shorter, masked, of any pair; so no skeleton is another under a new name."""
    trained = composed(splits["train"])
    found = [runs(masked(record)) for record in trained]
    index = holders(found)
    assert all(found)
    for number, own in enumerate(found):
        shared = Counter(other for run in own for other in index[run] if other < number)
        for other, count in shared.items():
            if trained[other]["skeleton"] != trained[number]["skeleton"]:
                ids = trained[number]["id"], trained[other]["id"]
                assert count < min(len(own), len(found[other])) / 2, ids


def test_no_scenario_stands_in_two_splits(splits: Splits) -> None:
    train, validation, test = ({record["scenario"] for record in splits[split]} for split in SPLITS)
    assert train & validation == train & test == validation & test == set()


@pytest.mark.parametrize("split", ["validation", "test"])
def test_held_out_combinations_are_new_but_their_cases_are_trained_under_another_kind(
    split: str, splits: Splits
) -> None:
    """A scenario is `category | case | kind of plan`."""
    kinds: dict[tuple[str, str], set[str]] = defaultdict(set)
    for record in composed(splits["train"]):
        category, case, kind = record["scenario"].split(" | ")
        kinds[category, case].add(kind)
    asked = {record["scenario"] for record in composed(splits[split])}
    assert len(asked) >= 50
    for scenario in asked:
        category, case, kind = scenario.split(" | ")
        assert kinds[category, case], f"training does not show the case of {scenario}"
        assert kind not in kinds[category, case], f"training shows {scenario}"


def test_no_test_response_shares_more_than_half_of_its_8_grams_with_a_training_response(splits: Splits) -> None:
    index = holders([runs(record["response"]) for record in splits["train"]])
    over = {}
    for record in splits["test"]:
        own = runs(record["response"])
        shared = Counter(number for run in own for number in index.get(run, ()))
        number, count = max(shared.items(), key=lambda item: item[1], default=(0, 0))
        if not own or count > len(own) / 2:
            over[record["id"]] = f"{count} of {len(own)} in {splits['train'][number]['id']}"
    assert over == {}


# Gold


def test_at_least_sixty_gold_records_cover_all_categories_and_thirty_are_for_test(
    splits: Splits, records: list[Record]
) -> None:
    gold = [record for record in records if is_gold(record)]
    assert len(gold) >= 60
    assert {record["category"] for record in gold} == {record["category"] for record in records}
    assert sum(map(is_gold, splits["test"])) == 30


def test_gold_records_share_no_8_gram_with_composed_ones(records: list[Record]) -> None:
    by_hand = set().union(*(runs(record["response"]) for record in records if is_gold(record)))
    assert by_hand
    for record in composed(records):
        assert not runs(record["response"]) & by_hand, record["id"]


def test_the_gold_file_is_a_copy_of_the_gold_records_of_test(splits: Splits) -> None:
    def by_id(records: list[Record]) -> list[Record]:
        return sorted(records, key=lambda record: record["id"])

    assert by_id(read(CLAIMS / "gold.jsonl")) == by_id([record for record in splits["test"] if is_gold(record)])


# The programs


def run(script: str, *arguments: str) -> None:
    """In a process of its own, so that nothing, not even the order of a set, is carried over."""
    done = subprocess.run([sys.executable, str(SCRIPTS / script), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_build_program_writes_the_packaged_bytes_again(tmp_path: Path) -> None:
    """Its default seed is that of the packaged files."""
    run("build_claims.py", "--output_dir", str(tmp_path))
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written.keys() == {path.name for path in CLAIMS.glob("*.jsonl")}
    assert written.keys() == {*(f"{split}.jsonl" for split in SPLITS), "gold.jsonl"}
    assert [name for name in written if written[name] != (CLAIMS / name).read_bytes()] == []


def test_another_seed_gives_other_records(tmp_path: Path) -> None:
    run("build_claims.py", "--output_dir", str(tmp_path), "--seed", "1")
    for split in SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() != (CLAIMS / f"{split}.jsonl").read_bytes()


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """File -> its documents, of one megabyte in all."""
    folder = tmp_path_factory.mktemp("prose")
    run("build_claims_prose.py", "--output_dir", str(folder), "--megabytes", "1")
    return {path.stem: path.read_text("utf-8").split("\n<|endoftext|>\n") for path in folder.iterdir()}


def test_prose_never_looks_like_the_template(prose: dict[str, list[str]]) -> None:
    assert sum(len(document) for documents in prose.values() for document in documents) > 900_000
    for name, documents in prose.items():
        for document in documents:
            assert not LIKE_A_HEADER.search(document), name


def test_prose_names_no_service_under_a_kind_of_plan_that_is_held_out(
    prose: dict[str, list[str]], splits: Splits
) -> None:
    """Read by the names of plans and services that the records have; a plan is a house and the name of its kind.

    A file or a page of questions is about one case. A guide tells of several, each in lines of its own, and so is read
    by the line. Some services stand in two categories: a pair that training shows in either of them is left out.
    """
    trained, held_out = (
        {tuple(record["scenario"].split(" | ")[1:]) for name in names for record in composed(splits[name])}
        for names in (["train"], ["validation", "test"])
    )
    held_out -= trained
    assert len(held_out) >= 100
    kinds, houses = {}, set()
    for record in composed(splits["train"]):
        house, of_kind = record["facts"][0]["text"].split(" ", 1)
        houses.add(house)
        kinds[of_kind.lower()] = record["scenario"].split(" | ")[2]
    # The longest first: a "left wrist X-ray" is no "wrist X-ray".
    services = {service.lower(): service for service, _ in sorted(trained | held_out, key=lambda pair: -len(pair[0]))}
    service = re.compile(r"\b(" + "|".join(map(re.escape, services)) + r")\b")
    plan = re.compile(rf"(?i)\b(?:{'|'.join(houses)}) ({'|'.join(map(re.escape, kinds))})\b")

    passages = prose["claims_files"] + prose["claims_questions"]
    passages += [line for guide in prose["claims_guides"] for line in guide.splitlines()]
    named: Counter[tuple[str, str]] = Counter()
    for passage in map(str.lower, passages):
        for found in set(service.findall(passage)):
            for of_kind in set(plan.findall(passage)):
                named[services[found], kinds[of_kind]] += 1
    assert len(named.keys() & trained) >= 300
    assert {pair: count for pair, count in named.items() if pair in held_out} == {}
