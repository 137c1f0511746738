"""Write the packaged claims records: fictional denials, answered as a claims specialist would.

    in    --output_dir (default lit_phi2/assets/claims) and --seed (default 0)
    out   train.jsonl (480 records), validation.jsonl (60), test.jsonl (60); one JSON object a line:
          {"id", "category", "form", "instruction", "input", "response"}; input is "" in about half

    what is true (KNOWLEDGE) + where it goes next (ROUTES) + who asks, and how (VOICES, TONES) -> a record

A category has five cases. Each form (explain, draft, require) trains on three of them and keeps one for
validation and one for test, so a held-out record asks for a category, form and case that train never shows
together, though train knows the case from another form.

All people, plans, numbers and dates are invented. The health plans are meant as employer or individual plans
under the Affordable Care Act; Medicare, Medicaid and grandfathered plans follow other rules. The same seed
gives the same bytes.
"""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

Record = dict[str, str]


def listed(text: str, separator: str = ", ") -> list[str]:
    return text.split(separator)


HEALTH_PLANS = listed(
    "Alderquill Health, Bramblewick Health Plan, Copperfern Health, Dovetarn Benefit Trust, Elmsparrow Care, "
    "Foxglen Employee Plan, Greyheron Health, Hollowmere Health Plan, Juniper Quay Health, Larkstone Care, "
    "Mossbridge Benefits, Otterfield Health, Quillwater Health Plan"
)
CASUALTY_INSURERS = listed(
    "Amberlatch Insurance, Beaconthorn Mutual, Cinderpath Insurance, Duskharbor Mutual, Fernlock Insurance, "
    "Gablewren Mutual, Hearthgrove Insurance, Ironmeadow Mutual, Kestrelgate Insurance, Lanternhill Mutual, "
    "Millrook Insurance, Pebbleford Mutual, Thistledown Insurance"
)
GIVEN_NAMES = listed("Aisha, Ben, Carmen, Dmitri, Elena, Femi, Grace, Hiro, Ines, Jamal, Kavya, Liam, Mei")
SURNAMES = listed("Abbott, Castillo, Dunn, Farouk, Gomez, Huang, Keller, Mbeki, Okafor, Patel, Quinn")
MONTHS = listed("January, February, March, April, May, June, July, August, September, October")

# 29 CFR 2560.503-1(h)(3)(i), which 45 CFR 147.136(b) takes over; counted from receipt.
INTERNAL_APPEAL = "The member has at least 180 days after the notice to file an internal appeal."
# Four months from the final notice: 45 CFR 147.136(d)(2)(i). What it covers: (d)(1).
EXTERNAL_REVIEW = "If the appeal fails, external review may be requested within four months of that decision."
# 29 CFR 2560.503-1(i)(2)(i), for urgent care that has not been given yet.
EXPEDITED = "If delay would endanger health, ask for an expedited review, which takes at most 72 hours."


@dataclass(frozen=True)
class Route:
    """Where a denial goes next; shared by the categories that are answered the same way."""

    filing: str  # what is sent to cure the denial
    decides: str
    ask: str  # what a letter asks for: "Please <ask>"
    helper: str = ""  # whom a patient asks to do the cure; "" where patients do it themselves
    rights: tuple[str, ...] = (INTERNAL_APPEAL,)  # sentences on deadlines and further review


ROUTES = {
    "clinical": Route(
        filing="{category} appeal",
        # Not who decided first nor who reports to them: 29 CFR 2560.503-1(h)(3)(ii), (iii) and (v).
        decides="a clinician who took no part in the first decision",
        ask="approve the service",
        helper="the doctor's office",
        rights=(INTERNAL_APPEAL, EXTERNAL_REVIEW, EXPEDITED),
    ),
    "retro": Route(  # no medical judgment was made, so no external review is promised
        filing="retroactive authorization request",
        decides="the plan's utilization review staff",
        ask="approve the service after the fact",
        helper="the doctor's office",
    ),
    "drug": Route(
        filing="{category} exception request",
        decides="a pharmacist or doctor at the plan",
        ask="grant the exception",
        helper="the prescriber",
        rights=(INTERNAL_APPEAL, EXTERNAL_REVIEW, EXPEDITED),
    ),
    "surprise": Route(
        filing="surprise billing appeal",
        decides="a reviewer who took no part in the first decision",
        ask="reprocess the claim at in-network cost sharing",
        rights=(INTERNAL_APPEAL, EXTERNAL_REVIEW),
    ),
    "billing": Route(  # a provider's own dispute is a matter of its contract, so no number of days is given
        filing="claim reconsideration request",
        decides="a claims examiner",
        ask="reopen the claim and pay what is due",
        helper="the billing office",
        rights=("Check the deadline for disputes, and have the bill held until the plan answers.",),
    ),
    "coverage": Route(
        filing="{category} correction request",
        decides="the plan's benefits unit",
        ask="correct the file and reprocess the claim",
    ),
    "casualty": Route(
        filing="{category} reinspection request",
        decides="a claims supervisor",
        ask="inspect the damage again and pay the covered repair",
        rights=(
            "If the insurer still refuses, ask which policy wording it relies on.",
            "If this fails, the state insurance department takes complaints.",
        ),
    ),
}

# A paragraph for each category; a line that begins with # is a source.
#     name | route | what the fact of a case does: "<fact>, which <does>" | what the notice says
#     what that means
#     its cure, from a verb on: "<cure>" or "ask the billing office to <cure>"
#     three documents
#     five cases, "service: fact", read as "the <service>" and "because <fact>"
KNOWLEDGE = """
medical necessity | clinical | shows why the care is needed | The records do not show a medical need.
The plan did not find enough in the records to call this care medically necessary.
send a letter that answers each point of the plan's medical policy
a letter of medical necessity; the office notes and test results; the plan's policy
lumbar spine MRI: eight weeks of physical therapy did not relieve the leg weakness
inpatient rehabilitation stay: two helpers were needed to stand and walk safely
home oxygen: oxygen levels fell to 84 percent during a walking test
sleep study: breathing pauses were seen at night and daytime sleepiness is severe
cardiac stress test: chest pain returns with mild effort

prior authorization | retro | explains why care came before approval | No prior authorization is on file.
The plan wants approval before this service and found none; it has not said the care was wrong.
look for an approval number and, if there is none, request a retroactive review
the records of that day; the dated order; a note on why approval was not sought first
abdominal CT scan: sudden severe pain at night left no time to ask
gallbladder surgery: an infected gallbladder called for surgery that night
hospital transfer: the first hospital had no brain surgeon on call
breast biopsy: a new finding during the visit called for a sample the same day
home infusion: discharge came on a holiday when the plan's line was closed

timely filing | billing | shows that the first claim was on time | The claim came in after the filing limit.
The plan says the claim came in after its filing limit; it has not judged the care itself.
resend the claim with dated proof of the first filing
the acceptance report or receipt; a copy of the first claim; the call log
office visit: the clearinghouse accepted the claim two weeks after the visit
outpatient colonoscopy: the plan's own portal logged the claim in the first month
eye surgery: a mail receipt shows that the claim arrived in the second month
ankle surgery: a batch report lists the claim as accepted on day 20
lab panel: the plan's early letter asking for records quotes the first claim

coordination of benefits | coverage | helps settle who pays first | Another insurer may have to pay first.
The plan thinks another insurer may have to pay first, so payment waits for that answer.
give both plans the dates of each coverage, then have the claim billed in the order they confirm
both insurance cards; the other plan's payment statement or end-of-coverage letter; the coverage dates
# The parent whose birthday comes first in the year is primary: NAIC Model Regulation 120.
pediatric visit: both parents cover the child and the mother's birthday comes first in the year
knee X-ray: the spouse's plan ended the month before the visit
hospital stay: this plan comes from the patient's own job and the other from a spouse
visit after a car crash: the auto policy has paid out its medical limit
outpatient surgery: the first plan has paid and its statement is in hand

duplicate claim | billing | shows two separate services | The claim matches one already processed.
The plan took this for a second copy of a claim that it had already processed.
check how the first claim ended and send a corrected claim that marks the second service
the result of the first claim; the notes with both times; the modifier that applies
chest X-ray: one film was taken before the tube was placed and one after
knee injection: the left knee was treated in the morning and the right in the afternoon
blood glucose test: the doctor ordered it in the morning and again at night
breathing treatment: two treatments were given four hours apart
wound repair: one cut was on the hand and the other on the forehead

bundled service | billing | shows that the service stands on its own | This counts as part of another service.
The plan treats this service as part of another one that day, so it paid nothing extra.
compare the note with the coding edits and, if the service was distinct, send a corrected claim
the procedure note; the diagnosis for each service; the modifier that the note supports
skin lesion removal: the lesion was on the other arm from the biopsy
office visit: the visit dealt with a new problem apart from the planned procedure
nerve block: the block was given in a separate session hours after surgery
tendon repair: the tendon was in a different finger
fracture care: the break was in the other wrist

# No Surprises Act: 45 CFR 149.110 (emergencies), 149.120 (facilities), 149.130 (air ambulance).
out of network | surprise | brings in the federal surprise billing rules | The provider is out of network.
The plan paid as out of network and left the balance to the member.
ask for in-network cost sharing under the No Surprises Act and have the bill put on hold
the bill; the explanation of benefits; proof of the emergency or the facility's network
emergency room visit: a sudden emergency led to the nearest hospital
anesthesia: the surgery was at an in-network hospital
pathology reading: the biopsy was taken at an in-network surgery center
air ambulance flight: no other flight could be chosen at the crash site
assistant surgeon fee: the surgeon and the hospital were both in network

eligibility | coverage | points to active coverage | Coverage was not active on the date of service.
The plan's file shows no active coverage for that date, which is often a mistake in dates or ID.
have the employer or marketplace confirm the coverage dates and ask the plan to reprocess
a copy of the ID card; proof of enrollment with its dates; proof of premium payment
office visit: the birth date was typed wrong at check-in
# Enrolled within 30 days, a newborn is covered from birth: 29 CFR 2590.701-6(b).
newborn hospital stay: the baby was enrolled twelve days after birth
shoulder MRI: the premium was paid inside the grace period
yearly physical exam: the employer reported the start date a month late
urgent care visit: continuation coverage was elected and the first payment has cleared

coding error | billing | shows where claim and record differ | A code or modifier does not fit the claim.
A code or modifier does not fit the rest of the claim, so the plan could not pay it as billed.
check every code against the signed note and send a corrected claim with the first claim's number
the signed note; the corrected code or modifier; the first claim's number
wrist X-ray: the claim says left and the note says right
video visit: the place of service was entered as the office
iron infusion: ten units were typed where the record shows one
colonoscopy: symptoms were coded though the note records a routine screening
clinic visit: a patient seen last year was coded as new

missing documentation | billing | explains the gap in the file | The records we asked for did not arrive.
The plan asked for records and did not get them in time, so it has not yet judged the care.
send every record that the plan's letter lists and confirm by phone that they arrived
a copy of the plan's letter; the signed records it lists; proof of sending
shoulder surgery: the operative report was faxed without a claim number
power wheelchair: the request for records went to an old address
emergency visit: only the first page of the record was sent
wound care visits: the notes were sent unsigned and have now been signed
hospital stay: the discharge summary was finished a week after the claim

experimental treatment | clinical | shows why standard care is not enough | The treatment is experimental.
The plan does not see enough evidence yet for this treatment in this condition.
send a letter that cites peer-reviewed studies and current guidelines for this exact use
the doctor's letter; the studies and guidelines it cites; the record of failed treatments
proton therapy: standard radiation would reach the brain stem
tumor gene test: two standard drugs failed and the result would choose the next one
spinal cord stimulator: surgery, injections and two drugs did not control the pain
cartilage implant: the defect is too large for the usual repair
lupus infusion: three usual drugs failed or caused harm

step therapy | drug | is a common ground for an exception | A preferred drug must be tried first.
The plan covers this drug only after a preferred one, unless it grants an exception.
request an exception that names each drug tried, its dose, its dates and what happened
the prescriber's letter; the pharmacy fill history; the notes on earlier drugs
arthritis injection: methotrexate was stopped after liver tests rose
migraine injection: two preferred drugs failed at full dose
asthma injection: attacks went on with two preferred inhalers
diabetes pen: metformin caused severe stomach trouble
psoriasis tablet: light therapy and a preferred cream did not clear the skin

quantity limit | drug | shows why the usual amount falls short | The amount is over the quantity limit.
The plan covers this item, but only up to a set amount unless it grants an exception.
request an exception that states the diagnosis, the dose and why a lower amount fails
the prescriber's letter; the dosing instructions; a log of symptoms or use
migraine tablets: eight attacks a month remain on preventive treatment
glucose test strips: insulin is adjusted at every meal
nausea tablets: chemotherapy runs for five days in every cycle
rescue inhalers: one inhaler must stay at school and one at home
pain patches: the dose diary shows that each patch wears off a day early

benefit maximum | coverage | puts the count in question | The yearly benefit maximum has been reached.
The plan counts the yearly benefit as used up, which ends payment even if care is needed.
compare the plan's count with the plan document and the bills, and ask for a written recount
the benefit page of the plan document; the dates of every visit; the plan's count
physical therapy visits: two cancelled visits were counted as used
# Individual and small group plans may not put both under one limit: 45 CFR 156.115(a)(5)(iii).
speech therapy visits: habilitation and rehabilitation visits were counted together
chiropractic visits: visits from last year were counted
occupational therapy visits: hospital sessions were counted against the outpatient limit
nutrition counseling: the plan document allows twelve visits and only nine were billed

auto damage | casualty | ties the damage to this accident | The damage is not from the reported accident.
The insurer thinks this damage was there before the accident or has another cause.
ask for a second inspection and give the adjuster the shop's written findings
dated photos from before and after; the repair shop's findings; the accident report
rear bumper repair: fresh paint from the other car is in the scrape
windshield replacement: the crack starts at the point of impact
wheel alignment: a shop measured the wheels as straight a month before
door repair: photos from the week before show the door undamaged
headlight replacement: the bracket broke on the same side as the hit

property damage | casualty | points to a sudden loss | The damage is gradual and not covered.
The insurer sees this as slow wear or leakage, which most home policies leave out.
ask for a second inspection and give the adjuster the tradesperson's written report
the plumber's or roofer's report; dated photos; the repair invoices
kitchen floor repair: the pipe burst overnight and the floor was dry the day before
ceiling repair: the stain appeared the morning after the storm
roof repair: the same hail took shingles from three nearby roofs
basement cleanup: the water heater split and the plumber dated the break
bathroom wall repair: a supply line snapped and the broken part was kept
"""


@dataclass(frozen=True)
class Category:
    """One paragraph of KNOWLEDGE."""

    name: str
    route: Route
    proves: str
    notice: str
    meaning: str
    cure: str
    documents: list[str]
    cases: list[list[str]]


def parse_category(paragraph: str) -> Category:
    lines = [line for line in paragraph.splitlines() if not line.startswith("#")]
    name, route, proves, notice = listed(lines[0], " | ")
    meaning, cure = lines[1:3]
    cases = [listed(line, ": ") for line in lines[4:]]
    assert len(cases) == 5, f"{name}: `build` shares out five cases"
    return Category(name, ROUTES[route], proves, notice, meaning, cure, listed(lines[3], "; "), cases)


@dataclass(frozen=True)
class Voice:
    """Who asks, and how the answer speaks to them and for them."""

    i: str
    signer: str
    kindness: str
    person: str  # says for whom a letter is
    openings: list[str]  # the facts, as this voice tells them


VOICES = {
    "patient": Voice(
        i="I",
        signer="{member}",
        kindness="I am sorry that you have to deal with this.",
        person="My name is {member}; the reference is {reference} and the notice is dated {date}.",
        openings=[
            "{plan} denied the {service}. The notice says: {notice} I can show that {fact}.",
            'I got a letter from {plan} about the {service}. It says "{notice}" In fact, {fact}.',
            "{plan} will not pay for the {service}, although {fact}. Their reason: {notice}",
        ],
    ),
    "office": Voice(
        i="We",
        signer="Claims Office, for {member}",
        kindness="Thank you for taking this up.",
        person="This is from our claims office for {member}, reference {reference}, notice dated {date}.",
        openings=[
            "Our office filed for the {service}; {plan} denied it. The notice: {notice} We know that {fact}.",
            'Our office was turned down by {plan} for the {service}: "{notice}" Our file shows that {fact}.',
            "{plan} denied the {service} that our office sent in, although {fact}. Stated reason: {notice}",
        ],
    ),
    "analyst": Voice(
        i="We",
        signer="Appeals Team, for {member}",
        kindness="This one is worth pursuing.",
        person="Our appeals team writes for {member}, reference {reference}, notice dated {date}.",
        openings=[
            "Appeal file: {plan} denied the {service}. Reason given: {notice} The record shows that {fact}.",
            'Appeal under review: the {service}, denied by {plan} as "{notice}" On record: {fact}.',
            "On appeal: {plan} refused the {service}, although {fact}. Reason on the notice: {notice}",
        ],
    ),
}
FIELDS = "Denied by: {plan}\nService: {service}\nNotice: {notice}\nFact: {Fact}.\nFrom: {signer}"
LETTER_FIELDS = "\nReference: {reference}\nNotice dated: {date}"

TONES = {
    "polite": ["Could you please {request}?", "Would you kindly {request}? Thank you."],
    "terse": ["{Request}.", "Task: {request}."],
    "rushed": ["I have only five minutes: please {request}.", "This is due today, so quickly: {request}."],
}
REQUESTS = {
    "explain": ["explain why this was denied and what to do now", "tell me what this means and what is next"],
    "draft": ["draft a short letter that answers this denial", "write a brief appeal letter, ready to sign"],
    "require": ["list what the {filing} must hold", "tell me what a complete {filing} contains"],
}
RESPONSES = {
    "explain": [
        "{meaning} The key point is that {fact}, which {proves}. {Cure}. {right}",
        "This denial can be answered. {meaning} {Cure}. Point out that {fact}; this {proves}. {right}",
        "{meaning} {Cure}. Say plainly that {fact}. The new decision is made by {decides}. {right}",
        "{kindness} {meaning} Because {fact}, there is good reason to ask again. {Cure}. {right}",
    ],
    "draft": [
        "Dear {plan}:\n\n{i} ask for a new review of the {service}, reference {reference}. Your notice of "
        "{date} says: {notice} However, {fact}, which {proves}. Enclosed are {papers}. Please {ask}.\n\n"
        "Sincerely,\n{signer}",
        "Dear {plan}:\n\nPlease look again at the {service}, reference {reference}, notice of {date}. "
        "{Fact}. This {proves}. {i} enclose {papers}. {i} ask for {decides} to read the file. "
        "Please {ask}.\n\nThank you,\n{signer}",
        "Dear {plan}:\n\nThis letter answers your notice of {date} on the {service}, reference {reference}. "
        "{i} ask you to {ask}, because {fact}. To make the review easy, {papers} are enclosed. "
        "Please send your decision in writing.\n\nRespectfully,\n{signer}",
    ],
    "require": [
        "The {filing} should give {identity}. Enclose {papers}. State in one sentence that {fact}, which "
        "{proves}. It is decided by {decides}, so keep it short and in order.",
        "Put {identity} on the first page. Then add {papers}. The {filing} must also say that {fact}, "
        "because this {proves}. Keep a copy of everything you send.",
        "A complete {filing} holds {identity}, followed by {papers}. Make the point in plain words: {fact}. "
        "Send it to the address on the notice and keep proof that it arrived.",
        "Begin the {filing} with {identity}. Explain that {fact}; this {proves}. Support it with {papers}. {right}",
    ],
}
IDENTITY = "the name and number on the insurance card, the claim reference and the date of the notice"


def build(seed: int) -> dict[str, list[Record]]:
    """Split -> its records, shuffled, with ids that run on through all splits."""
    rng = random.Random(seed)
    splits: dict[str, list[Record]] = {"train": [], "validation": [], "test": []}
    for c, category in enumerate(map(parse_category, KNOWLEDGE.strip().split("\n\n"))):
        for f, form in enumerate(RESPONSES):
            # In this order every case is trained on in at least one form.
            for_validation, for_test = category.cases[f], category.cases[f + 2]
            for_train = [case for case in category.cases if case not in (for_validation, for_test)]
            # Every fourth of the 48 cells has a second held-out record: 48 + 12 = 60 for each split.
            quarter = (len(RESPONSES) * c + f) % 4
            planned = [("train", for_train[n % 3]) for n in range(10)]
            planned += [("validation", for_validation)] * (2 if quarter == 0 else 1)
            planned += [("test", for_test)] * (2 if quarter == 2 else 1)
            # A plan is drawn once in a cell, so no two records of it can ask the same thing.
            plans = CASUALTY_INSURERS if category.route is ROUTES["casualty"] else HEALTH_PLANS
            for (split, case), plan in zip(planned, rng.sample(plans, len(planned)), strict=True):
                splits[split].append(write_record(rng, category, form, plan, case))

    number = 0
    for records in splits.values():
        rng.shuffle(records)
        for n, record in enumerate(records):
            number += 1
            records[n] = {"id": f"claim-{number:04d}", **record}
    return splits


def write_record(rng: random.Random, category: Category, form: str, plan: str, case: list[str]) -> Record:
    """One record without its id. The facts are given; who asks, how, and the wording are drawn."""
    route = category.route
    voice_name = rng.choice(list(VOICES))
    voice = VOICES[voice_name]
    service, fact = case
    cure, right = category.cure, rng.choice(route.rights)
    if voice_name == "patient":
        cure = f"ask {route.helper} to {cure}" if route.helper else cure
        right = right.replace("The member has", "You have")
    filing = route.filing.format(category=category.name)
    member = f"{rng.choice(GIVEN_NAMES)} {rng.choice(SURNAMES)}"
    request = rng.choice(REQUESTS[form]).format(filing=filing)
    values = {
        **vars(route),
        **vars(category),
        **vars(voice),
        "plan": plan,
        "service": service,
        "fact": fact,
        "Fact": capitalized(fact),
        "Cure": capitalized(cure),
        "right": right,
        "filing": filing,
        "papers": "{}, {}, and {}".format(*category.documents),
        "identity": IDENTITY,
        "member": member,
        "signer": voice.signer.format(member=member),
        "reference": rng.randrange(1000, 10000),
        "date": f"{rng.choice(MONTHS)} {rng.randint(1, 28)}",
        "request": request,
        "Request": capitalized(request),
    }

    asked = rng.choice(TONES[rng.choice(list(TONES))])
    facts, fields = rng.choice(voice.openings), FIELDS
    if form == "draft":
        facts, fields = f"{facts} {voice.person}", fields + LETTER_FIELDS
    instruction, context = rng.choice(
        [(f"{facts} {asked}", ""), (f"{asked} {facts}", ""), (asked, facts), (asked, fields)]
    )
    return {
        "category": category.name,
        "form": form,
        "instruction": instruction.format(**values),
        "input": context.format(**values),
        "response": rng.choice(RESPONSES[form]).format(**values),
    }


def capitalized(text: str) -> str:
    return text[0].upper() + text[1:]


def check(splits: dict[str, list[Record]]) -> None:
    """Stop before anything is written if a wording breaks what the records promise."""
    everything = [record for records in splits.values() for record in records]
    assert len({(record["instruction"], record["input"]) for record in everything}) == len(everything)
    for record in everything:
        prompt = f"{record['instruction']}\n{record['input']}"
        assert 15 <= len(prompt.split()) <= 90, f"prompt length: {record}"
        assert 35 <= len(record["response"].split()) <= 90, f"response length: {record}"
        assert "#" not in prompt + record["response"], f"could be taken for a header: {record}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the packaged claims records.")
    parser.add_argument("--output_dir", type=Path, default=Path("lit_phi2/assets/claims"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    splits = build(args.seed)
    check(splits)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for split, records in splits.items():
        path = args.output_dir / f"{split}.jsonl"
        lines = "".join(json.dumps(record) + "\n" for record in records)
        path.write_text(lines, encoding="utf-8", newline="\n")
        print(f"{path}: {len(records)} records")


if __name__ == "__main__":
    main()
