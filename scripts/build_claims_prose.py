"""Compose claims prose for pretraining the tiny Phi: notices with short questions, loose sentences, files, drills.

    scripts/claims/ -> OUTPUT_DIR/claims_{questions,sentences,files,guides,drills}.txt, documents apart by <|endoftext|>

    python scripts/build_claims_prose.py --output_dir build/prose
    python scripts/build_claims_prose.py --whole --output_dir build/prose-whole    requests with their whole answers
    python scripts/build_claims_prose.py --whole --among CORPUS_DIR --output_dir build/prose-retold    retold, too

It is made of the training scenarios alone: none of validation or test, no gold record, never the instruction template.
Names, numbers and dates are drawn anew in each document, so that the only way to foretell one in an answer is to look
it up in the notice. Most documents ask for many such values in few words, with few whole answers: those come last, by
--whole, where a file goes on from request to request. To answer one in the template and stop is left to fine-tuning.

People do not write as a program does. With --among a quarter of the requests are told in pieces and in any order, among
sentences of foreign text, with values missing, or about a service and a fact that no file here knows. The answer names
what was told and speaks of the rest in general words: a strange request gets a plain answer, not an invented one.
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
AMONG_SHARES = {"questions": 0.08, "requests": 0.56, "retold": 0.26, "sorted": 0.04, "guides": 0.03, "drills": 0.03}

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
# How a value is told by someone in their own words, and what an answer says where nobody told it.
TOLD = {
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
UNTOLD = {
    "plan": "the insurer",
    "claim": "the claim",
    "member": "the member",
    "id": "the member's ID",
    "notice_date": "the date of the notice",
    "deadline": "the last day in the notice",
}
STRANGE_DOCUMENT = "record that shows it"  # where the case is none that the files know
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


def write_retold(rng: random.Random, scenarios: list[Scenario], foreign: list[str]) -> str:
    """A request in somebody's own words, in pieces among `foreign` sentences, and an answer that invents nothing."""
    category, case, kind = rng.choice(scenarios)
    person, form = rng.choice(people_of(category["line"])), rng.choice(FORMS)
    if rng.random() < 0.5:  # a case that no file knows: its service and its fact are whatever was said
        case = {"service": some_words(rng, foreign, 1, 3), "fact": some_words(rng, foreign, 5, 14)}
        case["document"] = STRANGE_DOCUMENT
    values = fill_values(rng, category, case, kind, person, form)
    untold = {slot for slot in ("plan", "claim", "member", "id", "notice_date") if rng.random() < 0.25}
    told = [slot for slot in TOLD if slot not in untold and values[slot] and (slot != "amount" or rng.random() < 0.3)]
    pieces = [rng.choice(TOLD[slot]).format(**values) for slot in rng.sample(told, len(told))]
    ask = rng.choice(PLAIN_ASKS[form] if rng.random() < 0.4 else category["asks"][form])
    pieces.insert(rng.choice((0, len(pieces), rng.randint(0, len(pieces)))), in_some_tone(rng, ask))
    for _ in range(rng.choice((0, 0, 1, 2, 3, 5))):
        pieces.insert(rng.randint(0, len(pieces)), rng.choice(foreign))
    join = rng.choice(JOINS)
    came_in = "".join(piece + (rng.choice(JOINS) if rng.random() < 0.3 else join) for piece in pieces).strip()
    if "notice_date" in untold:
        untold.add("deadline")
    general = {slot: UNTOLD[slot] for slot in untold}
    values |= general | {capitalized(slot): capitalized(text) for slot, text in general.items()}
    values["signer"] = person.signer.format(**values)
    number = rng.randrange(len(category["answers"][form]))
    before_ask, before_answer = rng.choice(REQUESTS)
    answer = compose_answer(rng, category, kind, form, number, values, with_sums=False)
    return before_ask + came_in + rng.choice(("\n", "\n\n")) + before_answer + answer


def some_words(rng: random.Random, foreign: list[str], least: int, most: int) -> str:
    """A run of words from somewhere in a sentence, without its stops."""
    words = re.findall(r"[\w'-]+", rng.choice(foreign))
    start = rng.randrange(max(1, len(words) - most))
    return " ".join(words[start : start + rng.randint(least, most)]).lower()


def sentences_of(folder: Path) -> list[str]:
    """The sentences of 5 to 30 words of the folder's *.txt, in the order of the files."""
    found = (
        sentence
        for path in sorted(folder.glob("*.txt"))
        for line in path.read_text(encoding="utf-8").splitlines()
        for sentence in re.split(r"(?<=[.?!]) +", line.strip())
    )
    kept = [s for s in found if 5 <= len(s.split()) <= 30 and re.search(r"[a-z]{3}", s) and "<|" not in s]
    if not kept:
        raise FileNotFoundError(f"{folder} holds no *.txt with sentences. Give --among a folder of text files.")
    return kept


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
    parser.add_argument("--among", type=Path, help="with --whole: a folder of *.txt, for requests among its sentences")
    parser.add_argument("--seed", type=int, default=0, help="that of the corpus: it decides which scenarios train")
    args = parser.parse_args()
    if args.among and not args.whole:
        parser.error("--among goes with --whole")
    shares = AMONG_SHARES if args.among else WHOLE_SHARES if args.whole else SHARES
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
    for name, share in shares.items():
        writer, rng = writers[name], random.Random(f"{args.seed} {name}{stage}")
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
