"""Compose claims prose for pretraining the tiny Phi: notices with short questions, loose sentences, files, drills.

    scripts/claims/ -> OUTPUT_DIR/claims_{questions,sentences,files,guides,drills}.txt, documents apart by <|endoftext|>

    python scripts/build_claims_prose.py --output_dir build/prose
    python scripts/build_claims_prose.py --whole --output_dir build/prose-whole    requests with their whole answers

It is made of the training scenarios alone: none of validation or test, no gold record, never the instruction template.
Names, numbers and dates are drawn anew in each document, so that the only way to foretell one in an answer is to look
it up in the notice. Most documents ask for many such values in few words, with few whole answers: those come last, by
--whole, where a file goes on from request to request. To answer one in the template and stop is left to fine-tuning.
"""

import argparse
import datetime
import random
from collections.abc import Callable
from pathlib import Path

from claims.compose import (
    FORMS,
    PROMPTS,
    Category,
    compose_answer,
    fill_values,
    in_some_tone,
    load_categories,
    scenarios_of,
)
from claims.world import KINDS, Kind, capitalized, draw_values, in_dollars, in_words, people_of

Scenario = tuple[Category, Category, Kind]  # category, case, kind of plan
# Of the characters.
SHARES = {"questions": 0.45, "sentences": 0.25, "files": 0.1, "guides": 0.05, "drills": 0.15}
WHOLE_SHARES = {"questions": 0.12, "requests": 0.74, "sorted": 0.06, "guides": 0.04, "drills": 0.04}

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
# What stands before a request, and before its answer.
REQUESTS = (
    ("", ""),
    ("Q: ", "A: "),
    ("> ", ""),
    ("Task: ", "Done: "),
    ("Message\n", "Reply\n"),
    ("Asked for: ", "Written:\n"),
    ("From the front desk: ", "Back to the front desk:\n"),
    ("- ", "-- "),
    ("To do\n", "Sent\n"),
    ("* ", "\n"),
)
WANTED = {"explain": "an explanation", "draft": "a letter", "require": "a list of what to send"}
PURPOSES = {"explain": "in answering it", "draft": "in a letter about it", "require": "in a submission"}
QUESTIONS = {
    "claim": (
        ("Which number does the file carry?", "{claim}"),
        ("What is the claim number?", "It is {claim}."),
        ("What shall I quote?", "Quote {claim}, please."),
    ),
    "member": (
        ("Who is this about?", "{member}, whose ID is {id}."),
        ("Whose name goes on top?", "That of {member}."),
        ("For whom?", "For {member}."),
        ("Who signs?", "{signer}"),
    ),
    "id": (
        ("Under which ID?", "{id}"),
        ("And the ID of {member}?", "It is {id}."),
    ),
    "plan": (
        ("Which plan decided?", "{plan}."),
        ("Who turned it down?", "{plan} did."),
        ("To whom do we write?", "To {plan}."),
        ("Who has {claim}?", "It lies with {plan}."),
    ),
    "notice_date": (
        ("When was the notice written?", "On {notice_date}."),
        ("Date of the notice?", "{notice_date}"),
        ("Since when is it known?", "Since {notice_date}."),
    ),
    "service": (
        ("What was asked for?", "The {service}."),
        ("What did {plan} refuse?", "It refused the {service}."),
    ),
    "fact": (
        ("What speaks for it?", "That {fact}."),
        ("What do we know ourselves?", "We know that {fact}."),
    ),
    "category": (("What kind of denial is it?", "It is about {category}."),),
    "document": (
        ("Which paper shows that {fact}?", "The {document}."),
        ("Which paper belongs to the {service}?", "The {document}."),
        ("What should be enclosed?", "Enclose the {document}."),
    ),
    "known": (("What should be named {purpose}?", "The words to use are: {known}."),),
    "days": (
        ("How long is there to ask for review?", "{days} days."),
        ("How many days?", "{days} days after {notice_date}."),
    ),
    "deadline": (
        ("What is the last day to ask for review?", "{deadline}, {days} days after {notice_date}."),
        ("Until when?", "Until {deadline}."),
        ("When do the days end?", "The {days} days from {notice_date} end on {deadline}."),
    ),
    "next": (("Who looks at it after {plan}?", "The {next}."),),
}
SUM_QUESTIONS = {
    "amount": (("What was billed?", "{amount}"),),
    "balance": (
        ("What is open?", "{balance}, which is {amount} less {paid}."),
        ("How much is left to pay?", "{balance}"),
    ),
}
SIGNS = (("Q: ", "\nA: "), ("- ", " "), ("", "\n"), ("Asked: ", " Answered: "), ("> ", "\n"), ("", " "))
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


def write_questions(rng: random.Random, scenarios: list[Scenario]) -> str:
    """A notice, then short questions about it, each with its short answer."""
    category, _, form, values, came_in, shows_sums = write_notice(rng, scenarios)
    known = rng.choice(category["facts"][form])
    values |= {"known": known, "category": category["name"], "purpose": PURPOSES[form]}
    asked = QUESTIONS | SUM_QUESTIONS if shows_sums else QUESTIONS
    before, between = rng.choice(SIGNS)
    lines = []
    for subject in rng.sample(list(asked), rng.randint(7, len(asked))):
        question, answer = rng.choice(asked[subject])
        lines.append(before + question.format(**values) + between + answer.format(**values))
    return came_in + "\n\n" + "\n".join(lines)


def write_notice(
    rng: random.Random, scenarios: list[Scenario]
) -> tuple[Category, Kind, str, dict[str, str], str, bool]:
    """What came in about one claim: a notice in some layout, or its story as told in one breath.

    Returns:
        Category, kind of plan, a form, the values of all slots, the text, and whether it shows sums.
    """
    category, case, kind = rng.choice(scenarios)
    person, form = rng.choice(people_of(category["line"])), rng.choice(FORMS)
    values = fill_values(rng, category, case, kind, person, form)
    layout = rng.choice([*PROMPTS["inputs"], "alone", "alone"])
    if layout == "alone":
        name = rng.choice(PROMPTS["names"][person.key]).format(**values)
        came_in = rng.choice(PROMPTS["alone"]).format(**values, name=name)
    else:
        came_in = rng.choice(PROMPTS["inputs"][layout]).format(**values)
    return category, kind, form, values, came_in, layout == "eob"


def write_sentences(rng: random.Random, scenarios: list[Scenario]) -> str:
    """A notice, then loose sentences about it in no order, from answers of every form."""
    category, kind, _, values, came_in, _ = write_notice(rng, scenarios)
    moves = [move for form in FORMS for skeleton in category["answers"][form] for move in skeleton if move != "@rights"]
    chosen = [kind.rights, *rng.sample(moves, rng.randint(3, 6))]
    rng.shuffle(chosen)
    heading = rng.choice(("Phrases", "Pieces for later", "To choose from", "Cuttings")) + rng.choice((":", ""))
    between = rng.choice(("\n", "\n* ", "\n\n"))
    return came_in + "\n\n" + between.join([heading, *(rng.choice(move).format(**values) for move in chosen)])


def write_file(rng: random.Random, scenarios: list[Scenario]) -> str:
    """The file of one claim: what came in, what was written about it, and an index card, in one order or another."""
    category, kind, form, values, came_in, shows_sums = write_notice(rng, scenarios)
    number = rng.randrange(len(category["answers"][form]))
    answer = compose_answer(rng, category, kind, form, number, values, shows_sums and form == "explain")
    written = rng.choice(HEADS[form]).format(**values) + answer
    recap = rng.choice(RECAPS).format(**values)
    orders = ([came_in, written, recap], [recap, came_in, written], [came_in, recap, written])
    return "\n\n".join(rng.choice(orders))


def write_requests(rng: random.Random, scenarios: list[Scenario]) -> str:
    """What came in about one claim, what was asked for about it, one thing after another, and what was written."""
    category, kind, _, values, came_in, shows_sums = write_notice(rng, scenarios)
    before_ask, before_answer = rng.choice(REQUESTS)
    between = rng.choice(("\n", "\n\n"))
    parts = []
    for form in rng.sample(FORMS, rng.choice((1, 2, 2, 3, 3))):
        parts.append(before_ask + in_some_tone(rng, rng.choice(category["asks"][form])))
        number = rng.randrange(len(category["answers"][form]))
        own = values | {"doctor": values["my doctor" if form == "draft" else "your doctor"]}
        own["Doctor"] = capitalized(own["doctor"])
        answer = compose_answer(rng, category, kind, form, number, own, shows_sums and form == "explain")
        parts.append(before_answer + answer)
    parts.insert(rng.choice((0, 1)), came_in)  # before the first request, or after it
    if rng.random() < 0.3:
        parts.append(rng.choice(RECAPS).format(**values))
    return between.join(parts)


def write_sorted(rng: random.Random, scenarios: list[Scenario]) -> str:
    """Requests as they came in, each with what it wants and what it is about."""
    lines = [rng.choice(("Mail, sorted", "Who gets what", "Requests of today"))]
    pattern = rng.choice(
        ("{ask} ({wanted}; {name})", "{wanted}, {name}: {ask}", "{ask}\n   wants {wanted}", "{wanted} | {ask}")
    )
    for _ in range(rng.randint(8, 14)):
        category, form = rng.choice(scenarios)[0], rng.choice(FORMS)
        ask = in_some_tone(rng, rng.choice(category["asks"][form]))
        lines.append(pattern.format(ask=ask, wanted=WANTED[form], name=category["name"]))
    return "\n".join(lines)


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
    subject = rng.choice(("days", "days", "days", "sums", "numbers", "numbers"))
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
    "questions": write_questions,
    "sentences": write_sentences,
    "files": write_file,
    "requests": write_requests,
    "sorted": write_sorted,
    "guides": write_guide,
    "drills": write_drill,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("build/prose"))
    parser.add_argument("--megabytes", type=float, default=80.0)
    parser.add_argument(
        "--whole", action="store_true", help="mostly requests, each with its whole answer: the end of training"
    )
    parser.add_argument("--seed", type=int, default=0, help="that of the corpus: it decides which scenarios train")
    args = parser.parse_args()
    shares = WHOLE_SHARES if args.whole else SHARES
    args.output_dir.mkdir(parents=True, exist_ok=True)
    scenarios = [
        (category, case, kind)
        for category in load_categories()
        for case, kind in scenarios_of(category, args.seed)["train"]
    ]
    for name, share in shares.items():
        writer, rng = WRITERS[name], random.Random(f"{args.seed} {name}{' whole' if args.whole else ''}")
        documents: list[str] = []
        size = 0
        while size < args.megabytes * 1e6 * share:
            documents.append(writer(rng, scenarios))
            size += len(documents[-1])
        path = args.output_dir / f"claims_{name}.txt"
        path.write_text("\n<|endoftext|>\n".join(documents) + "\n", encoding="utf-8")
        print(f"{path}: {len(documents):,} documents, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
