"""Compose claims prose for pretraining the tiny Phi: files of claims, short questions, guides, dates and sums.

    scripts/claims/ -> OUTPUT_DIR/claims_{files,questions,guides,drills}.txt, documents apart by <|endoftext|>

    python scripts/build_claims_prose.py --output_dir build/prose

It is made of the training scenarios alone: none of validation or test, no gold record, never the instruction template.
Names, numbers and dates are drawn anew in each document, so that the only way to foretell the second mention of one is
to look back at the first.
"""

import argparse
import datetime
import random
from collections.abc import Callable
from pathlib import Path

from claims.compose import FORMS, PROMPTS, Category, compose_answer, fill_values, load_categories, scenarios_of
from claims.world import KINDS, Kind, draw_values, in_dollars, in_words, people_of

Scenario = tuple[Category, Category, Kind]  # category, case, kind of plan
SHARES = {"files": 0.5, "questions": 0.2, "guides": 0.1, "drills": 0.2}  # of the characters

HEADS = {
    "explain": (
        "Memo for the file\n",
        "What this means\n",
        "Explained to {member} by telephone:\n",
        "Assessment of {claim}: ",
        "* * *\n",
    ),
    "draft": ("Letter sent\n\n", "Outgoing mail, {claim}\n\n", "Typed for {member}:\n\n", "* * *\n\n"),
    "require": (
        "Sent back with a checklist:\n",
        "To be complete\n",
        "Desk rule, applied to {member}: ",
        "* * *\n",
    ),
}
RECAPS = (
    "Index card: {claim}; {member}; {id}; {plan}; {notice_date}; {service}.",
    "Logged under {claim} for {member} ({id}), {plan}, notice of {notice_date}, last day {deadline}.",
    "Number {claim}\nName {member}\nID {id}\nPlan {plan}\nNotice {notice_date}\nLast day {deadline}\n"
    "Paper to find: {document}",
    "{member}, {id}. {plan}. {service}. Reference {claim}. Dated {notice_date}.",
    "Last day: {deadline}, which is {days} days from {notice_date}. File {claim}, {plan}.",
)
PURPOSES = {"explain": "in answering it", "draft": "in a letter about it", "require": "in a submission"}
QUESTIONS = (
    ("Which number does the file carry?", "{claim}"),
    ("What is the claim number?", "It is {claim}."),
    ("Who is this about?", "{member}, whose ID is {id}."),
    ("Which plan decided?", "{plan}."),
    ("When was the notice written?", "On {notice_date}."),
    ("What was asked for?", "The {service}."),
    ("What speaks for it?", "That {fact}."),
    ("What kind of denial is it?", "It is about {category}."),
    ("Which paper shows that {fact}?", "The {document}."),
    ("Which paper belongs to the {service}?", "The {document}."),
    ("What should be named {purpose}?", "The words to use are: {known}."),
    ("What is the last day to ask for review?", "{deadline}, {days} days after {notice_date}."),
    ("How long is there to appeal?", "{days} days, until {deadline}."),
    ("Who looks at it after {plan}?", "The {next}."),
    ("Whose name and number go on top?", "{member}, {id}, and {claim}."),
)
GUIDES = (
    "The notice says: {notice} The {document} answers it where {fact}.",
    "For the {service}, look for the {document}; it shows that {fact}.",
    "Case of {member}: the {service}. Because {fact}, the {document} went in with {claim}.",
    "{notice} So wrote {plan} about the {service}. The {document} changed that.",
)
DAYS = ("{a}, {days} days: {b}", "{days} days from {a} is {b}.", "Notice of {a}: the last of {days} days is {b}.")
SUMS = ("{a} less {b} leaves {c}", "Of {a} billed, {b} is paid and {c} is open.", "{a} - {b} = {c}")
NUMBERS = (
    "{claim} {member} {id} {plan}",
    "{member}: {claim}, {notice_date}",
    "{plan} | {claim} | {id}",
    "{claim}",
    "{member}, ID {id}",
    "{notice_date} {claim}",
    "{amount} for {claim}",
)


def write_file(rng: random.Random, scenarios: list[Scenario]) -> str:
    """The file of one claim: what came in, what was written about it, and an index card, in one order or another."""
    category, case, kind = rng.choice(scenarios)
    person, form = rng.choice(people_of(category["line"])), rng.choice(FORMS)
    values = fill_values(rng, category, case, kind, person, form)
    layout = rng.choice(list(PROMPTS["inputs"]))
    came_in = rng.choice(PROMPTS["inputs"][layout]).format(**values)
    number = rng.randrange(len(category["answers"][form]))
    with_sums = layout == "eob" and form == "explain"
    answer = compose_answer(rng, category, kind, form, number, values, with_sums)
    written = rng.choice(HEADS[form]).format(**values) + answer
    recap = rng.choice(RECAPS).format(**values)
    orders = ([came_in, written, recap], [recap, came_in, written], [came_in, recap, written])
    return "\n\n".join(rng.choice(orders))


def write_questions(rng: random.Random, scenarios: list[Scenario]) -> str:
    """A notice, then short questions about it, each with its short answer."""
    category, case, kind = rng.choice(scenarios)
    person, form = rng.choice(people_of(category["line"])), rng.choice(FORMS)
    values = fill_values(rng, category, case, kind, person, form)
    known = rng.choice(category["facts"][form])
    values |= {"known": known, "category": category["name"], "purpose": PURPOSES[form]}
    came_in = rng.choice(PROMPTS["inputs"][rng.choice(list(PROMPTS["inputs"]))]).format(**values)
    before, between = rng.choice((("Q: ", "\nA: "), ("- ", " "), ("", "\n"), ("Asked: ", " Answered: ")))
    asked = rng.sample(QUESTIONS, rng.randint(4, 8))
    lines = [before + question.format(**values) + between + answer.format(**values) for question, answer in asked]
    return came_in + "\n\n" + "\n".join(lines)


def write_guide(rng: random.Random, scenarios: list[Scenario]) -> str:
    """What is known of one kind of denial: its papers, case by case, and the words that matter."""
    category = rng.choice(scenarios)[0]
    own = [(case, kind) for other, case, kind in scenarios if other["name"] == category["name"]]
    lines = [f"Notes on {category['name']}, for new colleagues"]
    for case, kind in rng.sample(own, min(4, len(own))):
        form = rng.choice(FORMS)
        values = fill_values(rng, category, case, kind, rng.choice(people_of(category["line"])), form)
        lines.append(rng.choice(GUIDES).format(**values))
        moves = [move for move in rng.choice(category["answers"][form]) if move != "@rights"]
        lines.append(rng.choice(rng.choice(moves)).format(**values))
    form = rng.choice(FORMS)
    facts = category["facts"][form]
    lines.append(f"Never leave out, {PURPOSES[form]}: " + ", ".join(rng.sample(facts, len(facts))) + ".")
    return "\n".join(lines)


def write_drill(rng: random.Random, scenarios: list[Scenario]) -> str:
    """A page of a deadline calendar, of an account, or of a list of numbers that comes again; of no scenario."""
    subject = rng.choice(("days", "days", "sums", "numbers", "numbers", "numbers"))
    if subject == "days":
        days = rng.choice((30, 45, 60, 60, 65, 90, 180, 180))
        lines, pattern = [rng.choice(("Deadline calendar", "Last days", "Dates to keep"))], rng.choice(DAYS)
        for _ in range(rng.randint(4, 9)):
            start = datetime.date(2025, 1, 1) + datetime.timedelta(days=rng.randrange(730))
            end = start + datetime.timedelta(days=days)
            lines.append(pattern.format(a=in_words(start), b=in_words(end), days=days))
    elif subject == "sums":
        lines, pattern = [rng.choice(("Account", "Open balances", "Billed, paid, open"))], rng.choice(SUMS)
        for _ in range(rng.randint(4, 9)):
            billed = rng.randrange(8_000, 950_000)
            paid = rng.randrange(0, billed // 100) * 100
            lines.append(pattern.format(a=in_dollars(billed), b=in_dollars(paid), c=in_dollars(billed - paid)))
    else:
        values = [draw_values(rng, rng.choice(KINDS)) for _ in range(rng.randint(2, 6))]
        pattern = rng.choice(NUMBERS)
        lines = []
        for heading in ("Received today", "Called back", "Closed"):
            lines += [heading, *(pattern.format(**some) for some in rng.sample(values, len(values))), ""]
        lines.pop()
    return "\n".join(lines)


WRITERS: dict[str, Callable[[random.Random, list[Scenario]], str]] = {
    "files": write_file,
    "questions": write_questions,
    "guides": write_guide,
    "drills": write_drill,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("build/prose"))
    parser.add_argument("--megabytes", type=float, default=40.0)
    parser.add_argument("--seed", type=int, default=0, help="that of the corpus: it decides which scenarios train")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    scenarios = [
        (category, case, kind)
        for category in load_categories()
        for case, kind in scenarios_of(category, args.seed)["train"]
    ]
    for name, writer in WRITERS.items():
        rng = random.Random(f"{args.seed} {name}")
        documents: list[str] = []
        size = 0
        while size < args.megabytes * 1e6 * SHARES[name]:
            documents.append(writer(rng, scenarios))
            size += len(documents[-1])
        path = args.output_dir / f"claims_{name}.txt"
        path.write_text("\n<|endoftext|>\n".join(documents) + "\n", encoding="utf-8")
        print(f"{path}: {len(documents):,} documents, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
