"""Compose claims prose to pretrain the tiny Phi: notices with short questions, loose sentences, files, drills.

    scripts/claims/ -> OUTPUT_DIR/claims_{questions,sentences,files,guides,drills}.txt, documents between <|endoftext|>

    python scripts/build_claims_prose.py --output_dir build/prose
    python scripts/build_claims_prose.py --whole --output_dir build/prose-whole    requests with their whole responses
    python scripts/build_claims_prose.py --whole --among CORPUS_DIR --output_dir build/prose-retold    and retold ones

It uses the training scenarios only: none of validation or test, no gold record, never the instruction template. Names,
numbers and dates are drawn for each document, so the only way to predict one in a response is to look it up in the
notice. Most documents ask for many such values in few words and have few whole responses. Those come last, with
--whole, where a file contains several requests. To respond to one in the template and stop is left to fine-tuning.

People do not write like a program. With --among, a quarter of the requests are written in fragments and in any order,
among sentences of foreign text, with values missing, or about a service and a fact that no file here has. The
response names what the request contains and speaks of the rest in general terms, so that an unusual request gets a
plain response instead of an invented one.
"""

import argparse
import datetime
import functools
import random
import re
from collections.abc import Callable
from pathlib import Path

from claims.compose import (
    FORMS,
    PROMPTS,
    Category,
    apply_tone,
    compose_response,
    fill_values,
    load_categories,
    scenarios_of,
)
from claims.world import KINDS, Kind, capitalized, draw_values, in_dollars, in_words, people_of

Scenario = tuple[Category, Category, Kind]  # category, case, kind of plan
# Kind of document -> fraction of the characters.
MIX = {"questions": 0.45, "sentences": 0.25, "files": 0.1, "guides": 0.05, "drills": 0.15}
WHOLE_MIX = {"questions": 0.12, "requests": 0.74, "sorted": 0.06, "guides": 0.04, "drills": 0.04}
AMONG_MIX = {"questions": 0.08, "requests": 0.56, "retold": 0.26, "sorted": 0.04, "guides": 0.03, "drills": 0.03}

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
# Text before a request, and before its response.
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
# How someone states a value in their own words, and what a response says where the request does not state it.
STATED = {
    "plan": ("{plan}", "from {plan}", "we have {plan}", "{plan} said no", "this is {plan} again", "Insurer: {plan}"),
    "claim": ("claim {claim}", "number {claim}", "ref. {claim}", "{claim}", "their number is {claim}", "#{claim}"),
    "member": ("I'm {member}", "for {member}", "Name: {member}", "{member} here", "it is about {member}", "{member}"),
    "id": ("ID {id}", "policy {id}", "{id} on the card", "{id}", "my number with them is {id}"),
    "notice_date": ("dated {notice_date}", "{notice_date}", "the letter is from {notice_date}", "on {notice_date}"),
    "service": ("about the {service}", "they won't pay for the {service}", "{service} refused", "it was the {service}"),
    "fact": ("{fact}", "the thing is that {fact}", "nobody there saw that {fact}", "and {fact}", "Note: {fact}"),
    "notice": ("{notice}", "it says: {notice}", '"{notice}"', "the reason, word for word: {notice}"),
    "limit": ("{limit}", "at the bottom: {limit}", "it also says: {limit}"),
    "amount": ("billed {amount}", "they want {amount} from me", "{amount} in all"),
}
UNSTATED = {
    "plan": "the insurer",
    "claim": "the claim",
    "member": "the member",
    "id": "the member's ID",
    "notice_date": "the date of the notice",
    "deadline": "the last day in the notice",
}
UNKNOWN_DOCUMENT = "record that shows it"  # for a case that is in no file
PLAIN_ASKS = {
    "explain": (
        "Why did they say no, and what now?",
        "What does this mean?",
        "What can I do?",
        "Is this right? Can we fix it?",
        "Please explain it to me.",
        "What should we do next?",
        "Are they allowed to do that?",
        "help, i don't understand this",
    ),
    "draft": (
        "Please write to them.",
        "Write the letter.",
        "Can you draft the appeal?",
        "I need something I can sign and send.",
        "Draft it for us, short.",
        "Put that into a letter.",
        "write it for me please",
    ),
    "require": (
        "What will they want from me?",
        "What do we have to send?",
        "List what must go in.",
        "Which papers do I need?",
        "What has to be in the request?",
        "give me a checklist",
    ),
}
JOINS = (". ", ".\n", ", ", "; ", "\n", " - ", "... ", " / ")
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
    """The notice of one claim, in one of the layouts, or its story in one paragraph.

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
    """A notice, then loose sentences about it in no order, from responses of every form."""
    category, kind, _, values, came_in, _ = write_notice(rng, scenarios)
    moves = [
        move for form in FORMS for skeleton in category["responses"][form] for move in skeleton if move != "@rights"
    ]
    chosen = [kind.rights, *rng.sample(moves, rng.randint(3, 6))]
    rng.shuffle(chosen)
    heading = rng.choice(("Phrases", "Pieces for later", "To choose from", "Cuttings")) + rng.choice((":", ""))
    between = rng.choice(("\n", "\n* ", "\n\n"))
    return came_in + "\n\n" + between.join([heading, *(rng.choice(move).format(**values) for move in chosen)])


def write_file(rng: random.Random, scenarios: list[Scenario]) -> str:
    """The file of one claim: the notice, a response, and an index card, in one of three orders."""
    category, kind, form, values, came_in, shows_sums = write_notice(rng, scenarios)
    number = rng.randrange(len(category["responses"][form]))
    answer = compose_response(rng, category, kind, form, number, values, shows_sums and form == "explain")
    written = rng.choice(HEADS[form]).format(**values) + answer
    recap = rng.choice(RECAPS).format(**values)
    orders = ([came_in, written, recap], [recap, came_in, written], [came_in, recap, written])
    return "\n\n".join(rng.choice(orders))


def write_requests(rng: random.Random, scenarios: list[Scenario]) -> str:
    """The notice of one claim, then one to three requests about it, each with its response."""
    category, kind, _, values, came_in, shows_sums = write_notice(rng, scenarios)
    before_ask, before_answer = rng.choice(REQUESTS)
    between = rng.choice(("\n", "\n\n"))
    parts = []
    for form in rng.sample(FORMS, rng.choice((1, 2, 2, 3, 3))):
        parts.append(before_ask + apply_tone(rng, rng.choice(category["asks"][form])))
        number = rng.randrange(len(category["responses"][form]))
        slots = values | {"doctor": values["my doctor" if form == "draft" else "your doctor"]}
        slots["Doctor"] = capitalized(slots["doctor"])
        answer = compose_response(rng, category, kind, form, number, slots, shows_sums and form == "explain")
        parts.append(before_answer + answer)
    parts.insert(rng.choice((0, 1)), came_in)  # before the first request, or after it
    if rng.random() < 0.3:
        parts.append(rng.choice(RECAPS).format(**values))
    return between.join(parts)


def write_retold(rng: random.Random, scenarios: list[Scenario], foreign: list[str]) -> str:
    """A request in somebody's own words, in pieces among `foreign` sentences, and a response that invents nothing."""
    category, case, kind = rng.choice(scenarios)
    person, form = rng.choice(people_of(category["line"])), rng.choice(FORMS)
    if rng.random() < 0.5:  # a case of no file: its service and its fact are random words
        case = {"service": random_words(rng, foreign, 1, 3), "fact": random_words(rng, foreign, 5, 14)}
        case["document"] = UNKNOWN_DOCUMENT
    values = fill_values(rng, category, case, kind, person, form)
    unstated = {slot for slot in ("plan", "claim", "member", "id", "notice_date") if rng.random() < 0.25}
    stated = [
        slot for slot in STATED if slot not in unstated and values[slot] and (slot != "amount" or rng.random() < 0.3)
    ]
    pieces = [rng.choice(STATED[slot]).format(**values) for slot in rng.sample(stated, len(stated))]
    ask = rng.choice(PLAIN_ASKS[form] if rng.random() < 0.4 else category["asks"][form])
    pieces.insert(rng.choice((0, len(pieces), rng.randint(0, len(pieces)))), apply_tone(rng, ask))
    for _ in range(rng.choice((0, 0, 1, 2, 3, 5))):
        pieces.insert(rng.randint(0, len(pieces)), rng.choice(foreign))
    join = rng.choice(JOINS)
    came_in = "".join(piece + (rng.choice(JOINS) if rng.random() < 0.3 else join) for piece in pieces).strip()
    if "notice_date" in unstated:
        unstated.add("deadline")
    general = {slot: UNSTATED[slot] for slot in unstated}
    values |= general | {capitalized(slot): capitalized(text) for slot, text in general.items()}
    values["signer"] = person.signer.format(**values)
    number = rng.randrange(len(category["responses"][form]))
    before_ask, before_answer = rng.choice(REQUESTS)
    answer = compose_response(rng, category, kind, form, number, values, with_sums=False)
    return before_ask + came_in + rng.choice(("\n", "\n\n")) + before_answer + answer


def random_words(rng: random.Random, foreign: list[str], minimum: int, maximum: int) -> str:
    """Some consecutive words of a sentence, without punctuation."""
    words = re.findall(r"[\w'-]+", rng.choice(foreign))
    start = rng.randrange(max(1, len(words) - maximum))
    return " ".join(words[start : start + rng.randint(minimum, maximum)]).lower()


def sentences_of(folder: Path) -> list[str]:
    """The sentences of 5 to 30 words of the folder's *.txt, in the order of the files."""
    sentences = (
        sentence
        for path in sorted(folder.glob("*.txt"))
        for line in path.read_text(encoding="utf-8").splitlines()
        for sentence in re.split(r"(?<=[.?!]) +", line.strip())
    )
    usable = [s for s in sentences if 5 <= len(s.split()) <= 30 and re.search(r"[a-z]{3}", s) and "<|" not in s]
    if not usable:
        raise FileNotFoundError(f"{folder} holds no *.txt with sentences. Give --among a folder of text files.")
    return usable


def write_sorted(rng: random.Random, scenarios: list[Scenario]) -> str:
    """A list of requests, each with its form and its category."""
    lines = [rng.choice(("Mail, sorted", "Who gets what", "Requests of today"))]
    pattern = rng.choice(
        ("{ask} ({wanted}; {name})", "{wanted}, {name}: {ask}", "{ask}\n   wants {wanted}", "{wanted} | {ask}")
    )
    for _ in range(rng.randint(8, 14)):
        category, form = rng.choice(scenarios)[0], rng.choice(FORMS)
        ask = apply_tone(rng, rng.choice(category["asks"][form]))
        lines.append(pattern.format(ask=ask, wanted=WANTED[form], name=category["name"]))
    return "\n".join(lines)


def write_guide(rng: random.Random, scenarios: list[Scenario]) -> str:
    """Notes on one category: the documents of its cases, and its facts."""
    category = rng.choice(scenarios)[0]
    pairs = [(case, kind) for other, case, kind in scenarios if other["name"] == category["name"]]
    lines = [f"Notes on {category['name']}, for new colleagues"]
    for case, kind in rng.sample(pairs, min(4, len(pairs))):
        form = rng.choice(FORMS)
        values = fill_values(rng, category, case, kind, rng.choice(people_of(category["line"])), form)
        lines.append(rng.choice(GUIDES).format(**values))
        moves = [move for move in rng.choice(category["responses"][form]) if move != "@rights"]
        lines.append(rng.choice(rng.choice(moves)).format(**values))
    form = rng.choice(FORMS)
    facts = category["facts"][form]
    lines.append(f"Never leave out, {PURPOSES[form]}: " + ", ".join(rng.sample(facts, len(facts))) + ".")
    return "\n".join(lines)


def write_drill(rng: random.Random, scenarios: list[Scenario]) -> str:
    """A page of a deadline calendar, of an account, or of a list that repeats its numbers; of no scenario."""
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
            lines += [heading, *(pattern.format(**slots) for slots in rng.sample(values, len(values))), ""]
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
        "--whole", action="store_true", help="mostly requests with their whole responses: the end of training"
    )
    parser.add_argument("--among", type=Path, help="with --whole: a folder of *.txt, for requests among its sentences")
    parser.add_argument(
        "--seed", type=int, default=0, help="of build_claims.py: it decides which scenarios are training scenarios"
    )
    args = parser.parse_args()
    if args.among and not args.whole:
        parser.error("--among: needs --whole")
    mix = AMONG_MIX if args.among else WHOLE_MIX if args.whole else MIX
    writers = WRITERS | (
        {"retold": functools.partial(write_retold, foreign=sentences_of(args.among))} if args.among else {}
    )
    stage = " among" if args.among else " whole" if args.whole else ""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    scenarios = [
        (category, case, kind)
        for category in load_categories()
        for case, kind in scenarios_of(category, args.seed)["train"]
    ]
    for name, fraction in mix.items():
        writer, rng = writers[name], random.Random(f"{args.seed} {name}{stage}")
        documents: list[str] = []
        size = 0
        while size < args.megabytes * 1e6 * fraction:
            documents.append(writer(rng, scenarios))
            size += len(documents[-1])
        path = args.output_dir / f"claims_{name}.txt"
        path.write_text("\n<|endoftext|>\n".join(documents) + "\n", encoding="utf-8")
        print(f"{path}: {len(documents):,} documents, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
