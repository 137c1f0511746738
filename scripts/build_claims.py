"""Compose the packaged claims records and check their guarantees.

    scripts/claims/ (categories/*.yaml: domain knowledge; world.py: people and plans; gold.jsonl: written by hand)
      -> lit_phi2/assets/claims/{train,validation,test}.jsonl, and gold.jsonl: a copy of the gold records of test

    python scripts/build_claims.py                 write the files
    python scripts/build_claims.py --check FILE    the errors in one category's file, and three of its records

Each scenario (`claims/compose.py`) belongs to one split, so validation and test ask for combinations that training
never has, of parts that it has. The facts of a record are what a correct response contains in any wording; every
wording of a form contains all of them, which is checked.

All people, plans, numbers and dates are invented. The same seed gives the same bytes.
"""

import argparse
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from claims.compose import FOLDER, FORMS, Category, Record, compose_record, load_categories, scenarios_of
from claims.world import capitalized, kinds_of
from lit_phi2.utils.files import read_json_lines

PER_CATEGORY = {"train": 150, "validation": 14, "test": 14}  # composed records
NGRAM = 8  # words
MAX_SHARED_NGRAMS = 0.45  # fraction of its n-grams that a held-out response may share with one training response
# Slots that every wording of a form contains, so that no fact depends on the wording.
SLOTS = {
    "explain": ("plan", "claim", "service", "fact", "document"),
    "draft": ("plan", "claim", "member", "service", "notice_date", "fact", "document", "signer"),
    "require": ("plan", "member", "id", "service", "fact", "document"),
}
ALL_SLOTS = {
    *("plan", "claim", "member", "id", "service", "fact", "document", "notice_date", "doctor", "who"),
    *("I", "my", "me", "signer", "Doctor", "Who", "Fact", "My", "Service", "Document"),
}


def build(seed: int) -> dict[str, list[Record]]:
    """Split -> its records, composed and gold, shuffled."""
    gold = list(read_json_lines(FOLDER / "gold.jsonl"))
    gold_ngrams = set().union(*(ngrams_of(record["response"]) for record in gold))
    rng = random.Random(seed)
    splits: dict[str, list[Record]] = {split: [] for split in PER_CATEGORY}
    seen_prompts: set[str] = set()
    trained: dict[tuple[str, ...], list[int]] = defaultdict(list)  # n-gram -> training records that contain it
    for split, count in PER_CATEGORY.items():
        for category in load_categories():
            pairs = scenarios_of(category, seed)[split]
            number = 0
            while number < count:
                case, kind = pairs[number % len(pairs)] if split != "train" else rng.choice(pairs)
                record = compose_record(rng, category, case, kind, FORMS[number % 3])
                check_facts(record)
                prompt, ngrams = record["instruction"] + record["input"], ngrams_of(record["response"])
                if prompt in seen_prompts or ngrams & gold_ngrams:
                    continue
                if split == "train":
                    for ngram in ngrams:
                        trained[ngram].append(len(splits["train"]))
                else:  # a response that is close to a training response would measure memory
                    shared = Counter(n for ngram in ngrams for n in trained.get(ngram, ()))
                    if shared and shared.most_common(1)[0][1] > MAX_SHARED_NGRAMS * len(ngrams):
                        continue
                seen_prompts.add(prompt)
                splits[split].append(record)
                number += 1
    for record in gold:
        check_facts(record)
        labels = {"scenario": f"gold | {record['id']}", "skeleton": f"gold | {record['id']}"}
        splits[record["split"]].append({**record, **labels})
    numbered = {split: number_records(rng, split, records) for split, records in splits.items()}
    return numbered | {"gold": [record for record in numbered["test"] if record["scenario"].startswith("gold")]}


def number_records(rng: random.Random, split: str, records: list[Record]) -> list[Record]:
    rng.shuffle(records)
    keys = ("category", "form", "scenario", "skeleton", "instruction", "input", "response", "facts")
    numbered = ({"id": record.get("id", f"{split}-{n:04d}"), **record} for n, record in enumerate(records, 1))
    return [{key: record[key] for key in ("id", *keys)} for record in numbered]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("lit_phi2/assets/claims"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", type=Path, help="a category's file: check it and write nothing")
    args = parser.parse_args()
    if args.check:
        show_check(args.check)
        return
    for category in load_categories():
        assert not (errors := list(errors_of(category))), f"{category['name']}: {errors}"
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for split, records in build(args.seed).items():
        path = args.output_dir / f"{split}.jsonl"
        lines = "".join(json.dumps(record) + "\n" for record in records)
        path.write_text(lines, encoding="utf-8", newline="\n")
        print(f"{path}: {len(records)} records")


def show_check(path: Path) -> None:
    category = yaml.safe_load(path.read_text(encoding="utf-8"))
    errors = list(errors_of(category))
    print("\n".join(f"ERROR {error}" for error in errors) or "no errors")
    if errors:
        return
    rng = random.Random()
    for _ in range(300):
        pair = rng.choice([(case, kind) for case in category["cases"] for kind in kinds_of(category)])
        check_facts(compose_record(rng, category, *pair, rng.choice(FORMS)))
    for form in FORMS:
        record = compose_record(rng, category, category["cases"][0], rng.choice(kinds_of(category)), form)
        print(
            f"\n=== {form}\n{record['instruction']}\n--- input\n{record['input']}\n--- response\n{record['response']}"
        )


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def ngrams_of(text: str) -> set[tuple[str, ...]]:
    """Its runs of NGRAM words.

    >>> len(ngrams_of("one two three four five six seven eight nine"))
    2
    """
    tokens = words(text)
    return {tuple(tokens[n : n + NGRAM]) for n in range(len(tokens) - NGRAM + 1)}


def errors_of(category: Category) -> Iterator[str]:
    """What is wrong with a category's file, in words for its author."""
    asks = [ask for asks in category["asks"].values() for ask in asks]
    prompt_text = "\n".join([*category["notices"], *asks]).lower()
    if not kinds_of(category):
        yield f"line {category['line']!r} is not one of health, auto, property, life, disability, travel"
    yield from _errors_of_cases(category, prompt_text)
    for form in FORMS:
        if len(category["asks"][form]) < 5:
            yield f"asks.{form}: at least 5 are needed"
        if len(category["responses"][form]) < 2:
            yield f"responses.{form}: at least 2 skeletons are needed"
        for fact in category["facts"][form]:
            if len(fact) < 4 or fact.lower() in prompt_text:
                yield f"facts.{form}: {fact!r} is too short, or occurs in notices or asks"
        for number, moves in enumerate(category["responses"][form], 1):
            for error in _errors_of_skeleton(moves, form, category["facts"][form]):
                yield f"responses.{form} {number}: {error}"


def _errors_of_cases(category: Category, prompt_text: str) -> Iterator[str]:
    for key, minimum in (("notices", 4), ("cases", 8)):
        if len(category[key]) < minimum:
            yield f"{key}: {len(category[key])}, at least {minimum} are needed"
    case_text = "\n".join(case["service"] + "\n" + case["fact"] for case in category["cases"]).lower()
    documents = Counter(case["document"].lower() for case in category["cases"])
    for document, count in documents.items():
        if count > 1 or document in prompt_text + case_text:
            yield f"document {document!r} belongs to several cases, or occurs in the prompts"
    for case in category["cases"]:
        if case["fact"][-1] in ".!" or re.search(r"\b(I|you|my|your)\b", case["fact"]):
            yield f"fact {case['fact']!r} ends with a full stop, or says I or you"


def _errors_of_skeleton(moves: list[Any], form: str, facts: list[str]) -> Iterator[str]:
    if (moves.count("@rights") != 1) if form == "explain" else ("@rights" in moves):
        yield "'@rights' must occur once in explain and nowhere else"
    written = [move for move in moves if move != "@rights"]
    for move in written:
        if not isinstance(move, list) or len(move) < 2:
            yield f"a move needs at least 2 alternatives: {move!r}"
    for text in (text for move in written for text in move):
        for slot in re.findall(r"\{(.*?)\}", text):
            if slot not in ALL_SLOTS:
                yield f"there is no slot {{{slot}}}: {text!r}"
        if form != "draft" and re.search(r"\{([Ii]|[Mm]y|me|signer)\}", text):
            yield f"{{I}}, {{my}}, {{me}} and {{signer}} are for drafts: {text!r}"
    for slot in SLOTS[form]:
        spellings = (f"{{{slot}}}", f"{{{capitalized(slot)}}}")
        if not any(all(any(spelling in text for spelling in spellings) for text in move) for move in written):
            yield f"no move has {{{slot}}} in all its alternatives"
    for fact in facts:
        if not any(all(fact.lower() in text.lower() for text in move) for move in written):
            yield f"no move has the fact {fact!r} in all its alternatives"


def check_facts(record: Record) -> None:
    """Every fact occurs in the response, and in the prompt if and only if it is copied."""
    prompt, response = (
        normalize(text) for text in (record["instruction"] + "\n" + record["input"], record["response"])
    )
    for fact in record["facts"]:
        text = normalize(fact["text"])
        assert len(text) >= 4, f"{fact} is too short to be searched for: {record}"
        assert text in response, f"{fact} does not occur in the response of {record}"
        assert (text in prompt) == (fact["kind"] == "copied"), (
            f"{fact} must occur in the prompt if and only if it is copied: {record}"
        )


def normalize(text: str) -> str:
    return re.sub(r"\s+", " ", text).lower()


if __name__ == "__main__":
    main()
