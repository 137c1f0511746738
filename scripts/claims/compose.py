"""Compose: a category's file and the invented world -> scenarios, prompts and records.

    category, case, kind of plan, form -> values of the slots -> instruction, input, response, facts

A scenario is a case (a service and the reason why it is due) under a kind of plan.

Keys of a category's file: name, line (of insurance), kinds (of plan; all of the line if absent), notices, cases
(service, fact, document), and by form asks, facts and responses. A response is a list of moves, each a list of
alternative wordings; the move @rights is written by the kind of plan.
"""

import random
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from claims.world import LABOR, MEDICAL, STATE, Kind, Person, capitalized, draw_values, kinds_of, people_of

FOLDER = Path(__file__).parent
FORMS = ("explain", "draft", "require")
HELD_OUT_SCENARIOS = 3  # of a category, in each of validation and test
NO_INPUT = 0.35  # fraction of the records without an input section
# The slots whose values are facts, by form; the prompt contains each of them.
COPIED = {
    "explain": ("plan", "claim", "notice_date"),
    "draft": ("plan", "claim", "member", "notice_date"),
    "require": ("plan", "member", "id"),
}

Category = dict[str, Any]  # one file of categories/
Record = dict[str, Any]

PROMPTS = yaml.safe_load((FOLDER / "prompts.yaml").read_text(encoding="utf-8"))


def load_categories() -> list[Category]:
    paths = sorted((FOLDER / "categories").glob("*.yaml"))
    return [yaml.safe_load(path.read_text(encoding="utf-8")) for path in paths]


def scenarios_of(category: Category, seed: int) -> dict[str, list[tuple[Category, Kind]]]:
    """Split -> its (case, kind) pairs. At most one kind of a case is held out, so training has every case."""
    kinds = kinds_of(category)
    rng = random.Random(f"{seed} {category['name']}")
    cases = rng.sample(category["cases"], len(category["cases"]))
    held_out = [(case, rng.choice(kinds)) for case in cases]
    test, validation = held_out[:HELD_OUT_SCENARIOS], held_out[HELD_OUT_SCENARIOS : 2 * HELD_OUT_SCENARIOS]
    excluded = {(case["service"], kind.key) for case, kind in test + validation}
    pairs = [(case, kind) for case in category["cases"] for kind in kinds]
    train = [(case, kind) for case, kind in pairs if (case["service"], kind.key) not in excluded]
    return {"train": train, "validation": validation, "test": test}


def compose_record(rng: random.Random, category: Category, case: Category, kind: Kind, form: str) -> Record:
    """A record without its id; the person, the request, the numbers and the wording are drawn."""
    person = rng.choice(people_of(category["line"]))
    values = fill_values(rng, category, case, kind, person, form)
    instruction, context, shows_sums = compose_prompt(rng, rng.choice(category["asks"][form]), values, person)
    number = rng.randrange(len(category["responses"][form]))
    with_sums = shows_sums and form == "explain"
    facts = [{"text": values[slot], "kind": "copied"} for slot in COPIED[form]]
    facts += [{"text": text, "kind": "known"} for text in (values["document"], *category["facts"][form])]
    if form == "explain":
        known_days = [{"text": f"{values['days']} days", "kind": "known"}] if kind.days else []
        facts += [*known_days, {"text": values["next"], "kind": "known"}]
        facts += [{"text": values["deadline"], "kind": "reasoned"}]
    if with_sums:
        facts += [{"text": values["amount"], "kind": "copied"}]
        facts += [{"text": values["balance"], "kind": "reasoned"}] if values["balance"] != values["amount"] else []
    return {
        "category": category["name"],
        "form": form,
        "scenario": f"{category['name']} | {case['service']} | {kind.key}",
        "skeleton": f"{category['name']} | {form} {number + 1}",
        "instruction": instruction,
        "input": context,
        "response": compose_response(rng, category, kind, form, number, values, with_sums),
        "facts": facts,
    }


def compose_response(
    rng: random.Random,
    category: Category,
    kind: Kind,
    form: str,
    number: int,
    values: dict[str, str],
    with_sums: bool,
) -> str:
    """Skeleton `number` with a drawn wording for each move: letters in paragraphs, lists in lines, else one text."""
    moves = list(category["responses"][form][number])
    if with_sums:
        moves.insert(moves.index("@rights"), PROMPTS["sums"])
    texts = [rng.choice(kind.rights if move == "@rights" else move).format(**values) for move in moves]
    response = texts[0]
    for before, part in pairwise(texts):
        numbered = re.match(r"\d\.|- ", part) or re.search(r"(?m)^(\d\.|- )", before)
        response += ("\n\n" if form == "draft" else "\n" if numbered else " ") + part
    return re.sub(r" ?\n ?", "\n", response).strip()


def fill_values(
    rng: random.Random, category: Category, case: Category, kind: Kind, person: Person, form: str
) -> dict[str, str]:
    """Slot -> value, for the prompt and the response."""
    values = draw_values(rng, kind)
    values |= {key: case[key] for key in ("service", "fact", "document")}
    values["notice"] = rng.choice(category["notices"])
    values["limit"] = "" if kind.days else PROMPTS["limit"].format(**values)
    values["next"] = kind.next_medical if category["name"] in MEDICAL else kind.next_other
    values["after"] = f"the {values['next']}" if values["next"] in (STATE, LABOR) else values["next"]
    values |= {"who": person.who, "I": person.I, "my": person.my, "me": person.me}
    values |= {"my doctor": person.my_doctor, "your doctor": person.doctor}
    values["doctor"] = values["my doctor" if form == "draft" else "your doctor"]
    values["signer"] = person.signer.format(**values)
    return values | {capitalized(key): capitalized(value) for key, value in values.items() if key != "I"}


def compose_prompt(rng: random.Random, ask: str, values: dict[str, str], person: Person) -> tuple[str, str, bool]:
    """Instruction, input, and whether sums are shown. They contain every value that a response copies."""
    ask = apply_tone(rng, ask)
    if rng.random() < NO_INPUT:
        name = rng.choice(PROMPTS["names"][person.key]).format(**values)
        story = re.sub(r"\s+", " ", rng.choice(PROMPTS["alone"]).format(**values, name=name)).strip()
        return (f"{story} {ask}" if rng.random() < 0.6 else f"{ask} {story}"), "", False
    layout = rng.choice(list(PROMPTS["inputs"]))
    context = rng.choice(PROMPTS["inputs"][layout]).format(**values)
    return ask, re.sub(r" +(\n|$)", r"\1", context), layout == "eob"


def apply_tone(rng: random.Random, ask: str) -> str:
    tone = rng.choice(list(PROMPTS["tones"]))
    ask = rng.choice(PROMPTS["tones"][tone]).format(ask=ask)
    if tone == "rushed":
        return ask.lower()
    return misspell(rng, ask.lower()) if tone == "misspelt" else ask


def misspell(rng: random.Random, text: str) -> str:
    """Swap or drop a letter in 40 % of the longer words."""
    words = text.split(" ")
    for n, word in enumerate(words):
        if word.isalpha() and len(word) > 4 and rng.random() < 0.4:
            at = rng.randrange(1, len(word) - 2)
            swapped = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
            words[n] = swapped if rng.random() < 0.6 else word[:at] + word[at + 1 :]
    return " ".join(words)
