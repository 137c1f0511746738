"""The invented world of the claims corpus: people, plans, numbers, dates, and who is asking.

    random.Random -> one Kind of plan, one Person who asks, the values of every slot

A kind of plan has its levels of review. Its rules are federal, with the source in a comment; where the policy itself
sets the time limit (auto, property, travel), the notice states it and no rule is claimed.
"""

import datetime
import random
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """A kind of plan. `days` is the federal time limit of the first review; None: the notice gives one."""

    key: str
    line: str
    suffixes: tuple[str, ...]  # of the plan's name: the only place where a prompt shows the kind
    days: int | None
    next_medical: str  # who reviews next where the denial was a medical judgment
    next_other: str
    rights: tuple[str, ...]  # slots: {days} {deadline} {notice_date} {who} {next}, {after} (with its article)


EMPLOYER_RIGHTS = (
    "Under an employer plan {who} can appeal for 180 days after the notice: counted from {notice_date}, to be safe, "
    "the last day is {deadline}. Beyond the plan itself {who} can turn to {after}.",
    "The federal rules give 180 days to appeal. From {notice_date} that runs to {deadline}; if the appeal fails, "
    "there is still {after}.",
    "Mark {deadline} in the calendar, 180 days from the notice of {notice_date}: the appeal must be in by then. "
    "If it fails, {who} can turn to {after}.",
    "File within 180 days, so no later than {deadline} for a notice of {notice_date}. Should the plan stand firm, "
    "{who} may turn next to {after}.",
)
MARKET_RIGHTS = (
    "A marketplace plan must accept an appeal for 180 days. Counted from {notice_date}, that is until {deadline}; "
    "after that appeal there is {after}.",
    "{Who} should appeal by {deadline}, which is 180 days after {notice_date}. After a second refusal {who} "
    "can turn to {after}.",
    "There are 180 days to appeal, from {notice_date} to {deadline}. If the answer is still no, {who} may go "
    "to {after}.",
    "The appeal is in time if it arrives by {deadline}: 180 days from the date on the notice, {notice_date}. Beyond "
    "that lies {after}.",
)
MEDICARE_RIGHTS = (
    "In Medicare Advantage the first appeal is due within 65 days: from {notice_date} that means {deadline}. If "
    "the plan says no again, an {next} is the next level.",
    "Medicare Advantage allows 65 days to ask the plan to think again, here until {deadline} (the notice is of "
    "{notice_date}). The level above is an {next}.",
    "{Who} must appeal within 65 days of {notice_date}, that is by {deadline}. A second no goes before an {next}.",
    "Count 65 days from {notice_date}: the appeal has to reach the plan by {deadline}. An {next} comes after it.",
)
MEDICAID_RIGHTS = (
    "A Medicaid plan takes appeals for 60 days after the notice, so from {notice_date} until {deadline}. If it "
    "upholds the denial, {who} may ask for a {next} within the 90 to 120 days that the state gives.",
    "With Medicaid managed care the limit is 60 days: {deadline}, counted from {notice_date}. After the plan's own "
    "appeal {who} can request a {next}.",
    "Appeal by {deadline}; that is 60 days from {notice_date}. A {next} can follow if the plan does not give way.",
    "From {notice_date} there are 60 days to appeal, up to {deadline}, and after the plan's answer a {next} "
    "may be asked for.",
)
INSURER_RIGHTS = (
    "The notice of {notice_date} allows {days} days for a written review, so ask by {deadline}. If the insurer "
    "holds to its view, {who} can complain to the {next}.",
    "Ask in writing by {deadline}, {days} days from {notice_date}, as the notice says. The {next} takes "
    "complaints after that.",
    "By the notice the review must be asked for within {days} days, that is by {deadline} for a letter of "
    "{notice_date}. Beyond the insurer there is the {next}.",
    "{Who} should write before the {days} days are over: {deadline}, counted from {notice_date}. A complaint to the "
    "{next} stays open.",
)
GROUP_RIGHTS = (
    "Group coverage through an employer gives {days} days to appeal. From {notice_date} the last day is {deadline}. "
    "Questions about the plan's duties go to the {next}.",
    "The appeal is due within {days} days of {notice_date}: {deadline}. The {next} helps where an "
    "employer plan does not "
    "follow the rules.",
    "Count {days} days from {notice_date} and file by {deadline}; {who} may also call the {next} for help "
    "with the plan.",
    "{Who} must file by {deadline}, {days} days after the notice of {notice_date}, and can get advice from the {next}.",
)

STATE, LABOR = "state insurance department", "Department of Labor"
KINDS = [
    # 29 CFR 2560.503-1(h)(3)(i): 180 days. External review where medical judgment is involved, within four months:
    # 45 CFR 147.136(d)(1)(ii) and (d)(2)(i), 29 CFR 2590.715-2719(d). The Department of Labor (EBSA) advises members of
    # employer plans.
    Kind(
        "employer plan",
        "health",
        ("Employee Health Plan", "Benefit Trust"),
        180,
        "external review",
        LABOR,
        EMPLOYER_RIGHTS,
    ),
    # 45 CFR 147.136(b)(3)(i) applies the 180 days to individual plans. State external review: (c)(2)(i) and (vi).
    Kind(
        "marketplace plan",
        "health",
        ("Marketplace Silver", "Marketplace Bronze"),
        180,
        "external review",
        STATE,
        MARKET_RIGHTS,
    ),
    # 42 CFR 422.582(b): 60 calendar days after receipt, presumed 5 days after the notice's date, so 65 from that date.
    # 422.592: independent review entity. Part D: 423.582(b), 423.600.
    Kind(
        "Medicare Advantage",
        "health",
        ("Medicare Advantage",),
        65,
        "independent review entity",
        "independent review entity",
        MEDICARE_RIGHTS,
    ),
    # 42 CFR 438.402(c)(2)(ii): 60 days; 438.408(f)(2): a state fair hearing within 90 to 120 days, as the state sets.
    Kind(
        "Medicaid plan",
        "health",
        ("Medicaid Care", "Community Medicaid"),
        60,
        "state fair hearing",
        "state fair hearing",
        MEDICAID_RIGHTS,
    ),
    Kind("personal auto", "auto", ("Personal Auto",), None, STATE, STATE, INSURER_RIGHTS),
    Kind("commercial auto", "auto", ("Commercial Auto",), None, STATE, STATE, INSURER_RIGHTS),
    Kind("homeowners", "property", ("Homeowners",), None, STATE, STATE, INSURER_RIGHTS),
    Kind("farmowners", "property", ("Farmowners",), None, STATE, STATE, INSURER_RIGHTS),
    # 29 CFR 2560.503-1(h)(2)(i): 60 days for group benefits other than health and disability.
    Kind("group life", "life", ("Group Life",), 60, LABOR, LABOR, GROUP_RIGHTS),
    Kind("individual life", "life", ("Individual Life",), None, STATE, STATE, INSURER_RIGHTS),
    # 29 CFR 2560.503-1(h)(3)(i) and (h)(4): 180 days for disability too.
    Kind("group disability", "disability", ("Group Disability",), 180, LABOR, LABOR, GROUP_RIGHTS),
    Kind("individual disability", "disability", ("Individual Disability",), None, STATE, STATE, INSURER_RIGHTS),
    Kind("single trip", "travel", ("Single Trip",), None, STATE, STATE, INSURER_RIGHTS),
    Kind("annual trip", "travel", ("Annual Trip",), None, STATE, STATE, INSURER_RIGHTS),
]
# Denials that depend on medical judgment (parity in medical management included) or on the surprise billing rules:
# 45 CFR 147.136(d)(1)(ii). A denial that depends on the contract alone is outside the federal process.
MEDICAL = {
    "medical necessity", "prior authorization", "step therapy", "quantity limit", "experimental treatment",
    "out of network", "surprise billing", "preventive care", "level of care", "formulary exclusion",
    "mental health parity",
}  # fmt: skip

HOUSES = [
    "Alderquill",
    "Amberlatch",
    "Beaconthorn",
    "Bramblewick",
    "Brightwater",
    "Cedarhollow",
    "Cinderpath",
    "Copperfern",
    "Cranbrook",
    "Dovetarn",
    "Duskharbor",
    "Eastmere",
    "Elmsparrow",
    "Fernlock",
    "Foxglen",
    "Gablewren",
    "Goldenreed",
    "Greyheron",
    "Harborgate",
    "Hartwell",
    "Hearthgrove",
    "Hollowmere",
    "Ironmeadow",
    "Juniper",
    "Kestrelgate",
    "Kingfisher",
    "Lanternhill",
    "Larkstone",
    "Lindenfield",
    "Maplecrest",
    "Millrook",
    "Mossbridge",
    "Northfield",
    "Oakhaven",
    "Otterfield",
    "Pebbleford",
    "Pinecrest",
    "Quillwater",
    "Ravenmoor",
    "Redcliff",
    "Rosewood",
    "Sandpiper",
    "Silverbrook",
    "Stonebridge",
    "Summerfield",
    "Thistledown",
    "Westbrook",
    "Willowbend",
    "Windermark",
    "Yellowbirch",
]
GIVEN_NAMES = [
    "Aisha",
    "Amir",
    "Anna",
    "Arjun",
    "Ben",
    "Bianca",
    "Carlos",
    "Carmen",
    "Chen",
    "Chloe",
    "Daniel",
    "Daria",
    "Diego",
    "Dmitri",
    "Elena",
    "Emma",
    "Erik",
    "Fatima",
    "Femi",
    "Frank",
    "Gloria",
    "Grace",
    "Hanna",
    "Hector",
    "Henry",
    "Hiro",
    "Ibrahim",
    "Ines",
    "Irene",
    "Jamal",
    "James",
    "Joan",
    "Jorge",
    "Julia",
    "Kavya",
    "Keisha",
    "Kim",
    "Lars",
    "Laura",
    "Leah",
    "Liam",
    "Lucia",
    "Marcus",
    "Maria",
    "Mei",
    "Miguel",
    "Nadia",
    "Nina",
    "Noah",
    "Olga",
    "Omar",
    "Patrick",
    "Paula",
    "Priya",
    "Rosa",
    "Ruth",
    "Samir",
    "Sofia",
    "Tara",
    "Thomas",
    "Tomas",
    "Vera",
    "Walter",
    "Yuki",
    "Zoe",
]
SURNAMES = [
    "Abbott",
    "Adeyemi",
    "Alvarez",
    "Baker",
    "Barnes",
    "Bauer",
    "Bell",
    "Brandt",
    "Carter",
    "Castillo",
    "Chang",
    "Cohen",
    "Cole",
    "Cruz",
    "Dunn",
    "Evans",
    "Farouk",
    "Fischer",
    "Foster",
    "Garcia",
    "Gomez",
    "Grant",
    "Hansen",
    "Hayes",
    "Huang",
    "Ibarra",
    "Jensen",
    "Johnson",
    "Kaplan",
    "Keller",
    "Khan",
    "Kowalski",
    "Larsen",
    "Lee",
    "Lopez",
    "Mbeki",
    "Mendez",
    "Meyer",
    "Moore",
    "Murphy",
    "Nakamura",
    "Nguyen",
    "Novak",
    "Okafor",
    "Olsen",
    "Ortiz",
    "Park",
    "Patel",
    "Perez",
    "Quinn",
    "Ramos",
    "Reed",
    "Rivera",
    "Rossi",
    "Santos",
    "Sato",
    "Schmidt",
    "Shah",
    "Silva",
    "Singh",
    "Sokolov",
    "Torres",
    "Vargas",
    "Weber",
    "Wong",
    "Young",
    "Zhang",
]


@dataclass(frozen=True)
class Person:
    """Who asks, with the words by which a response names the people involved."""

    key: str
    who: str
    signer: str
    I: str  # noqa: E741 (the word itself)
    my: str
    me: str
    doctor: str  # in an explanation or a list
    my_doctor: str  # in a letter written for them


HEALTH_PEOPLE = [
    Person("patient", "you", "{member}", "I", "my", "me", "your doctor", "my doctor"),
    Person("office", "the patient", "Billing Office, for {member}", "We", "our", "us", "your office", "our office"),
    Person(
        "analyst",
        "the member",
        "Appeals Team, for {member}",
        "We",
        "our",
        "us",
        "the treating doctor",
        "the treating doctor",
    ),
]
OTHER_PEOPLE = [
    Person("policyholder", "you", "{member}", "I", "my", "me", "", ""),
    Person("agency", "the policyholder", "Agency Office, for {member}", "We", "our", "us", "", ""),
    Person("analyst", "the insured", "Claims Review Team, for {member}", "We", "our", "us", "", ""),
]
LIFE_PEOPLE = [  # the claimant is not the insured person
    Person("policyholder", "you", "{member}", "I", "my", "me", "", ""),
    Person("agency", "the beneficiary", "Agency Office, for {member}", "We", "our", "us", "", ""),
    Person("analyst", "the claimant", "Claims Review Team, for {member}", "We", "our", "us", "", ""),
]


def kinds_of(category: dict[str, Any]) -> list[Kind]:
    """The kinds of plan of a category: those of its line of insurance, or those that its file names."""
    return [kind for kind in KINDS if kind.line == category["line"] and kind.key in category.get("kinds", [kind.key])]


def people_of(line: str) -> list[Person]:
    return {"health": HEALTH_PEOPLE, "life": LIFE_PEOPLE}.get(line, OTHER_PEOPLE)


def in_words(day: datetime.date) -> str:
    """
    >>> in_words(datetime.date(2026, 3, 3))
    'March 3, 2026'
    """
    return f"{day:%B} {day.day}, {day.year}"


def in_dollars(cents: int) -> str:
    """
    >>> in_dollars(128450)
    '$1,284.50'
    """
    return f"${cents // 100:,}.{cents % 100:02d}"


def draw_values(rng: random.Random, kind: Kind) -> dict[str, str]:
    """The values that every record has, drawn for one record."""
    notice = datetime.date(2025, 1, 2) + datetime.timedelta(days=rng.randrange(720))
    days = kind.days or rng.choice((30, 45, 60, 90))
    billed = rng.randrange(8_000, 950_000)
    paid = rng.choice((0, rng.randrange(1, billed // 100) * 100))
    return {
        "plan": f"{rng.choice(HOUSES)} {rng.choice(kind.suffixes)}",
        "claim": draw_number(rng),
        "id": rng.choice("HKMPRWXZ") + "".join(rng.choices("0123456789", k=8)),
        "member": f"{rng.choice(GIVEN_NAMES)} {rng.choice(SURNAMES)}",
        "notice_date": in_words(notice),
        "days": str(days),
        "deadline": in_words(notice + datetime.timedelta(days=days)),
        "amount": in_dollars(billed),
        "paid": in_dollars(paid),
        "balance": in_dollars(billed - paid),
    }


def draw_number(rng: random.Random) -> str:
    """A claim number, in one of the shapes that insurers use."""
    digits = "".join(rng.choices("0123456789", k=8))
    letters = "".join(rng.choices("ABCDEFGHJKLMNPRSTVWXYZ", k=2))
    return rng.choice(
        (f"CLM-{digits[:6]}", f"{letters}-{digits[:6]}", digits, f"{digits[:4]}-{digits[4:]}", f"{letters}{digits[:7]}")
    )


def capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]
