"""Drafts: what is proposed, and when; passes are simulated, each of a known time."""

import itertools
import random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_phi2.generation.drafts import (
    MANY_SLOTS,
    MAX_DRAFT,
    MAX_DRAFT_OF_MANY,
    Acceptance,
    Drafter,
    PassTimes,
    best_lengths,
)
from lit_phi2.generation.engine import Completion, generate
from lit_phi2.generation.ngrams import build_index
from lit_phi2.generation.questions import encode_questions
from lit_phi2.model.loading import load_phi2
from lit_phi2.model.phi2 import FusedPhiForCausalLM
from lit_phi2.pretrained import load_tokenizer, resolve_base_model
from lit_phi2.types import Example

EOS = 0
LETTER = list(range(10, 90))  # a text with phrases that return
PROMPT = [1, 2, 3]


def letter_drafter() -> Drafter:
    return Drafter(build_index([Example("a", [*PROMPT, *LETTER, EOS], len(PROMPT))]), eos_token_id=EOS)


def simulate(drafter: Drafter, texts: list[list[int]], seconds_per_draft: float) -> float:
    """Seconds of completing the texts one after another; a pass without drafts takes one second."""
    total = 0.0
    for key, text in enumerate(texts):
        done = 0
        while done < len(text):
            draft = drafter.propose([key], [PROMPT + text[:done]], [8])[0]
            accepted = 0
            while accepted < len(draft) and text[done + accepted : done + accepted + 1] == [draft[accepted]]:
                accepted += 1
            seconds = 1 + seconds_per_draft * len(draft)
            drafter.observe([accepted], seconds)
            total += seconds
            done += accepted + 1
    return total


def test_learned_text_takes_few_passes() -> None:
    drafter = letter_drafter()
    simulate(drafter, [[*LETTER, EOS]] * 20, seconds_per_draft=0.05)
    assert drafter.num_tokens / drafter.num_passes > 6


@pytest.mark.parametrize("seconds_per_draft", [0.05, 0.5, 5.0])
def test_drafts_on_text_that_shares_nothing_cost_under_3_percent(seconds_per_draft: float) -> None:
    """The tokens of the letter in random order: every match is short and foretells nothing."""
    rng = random.Random(0)
    texts = [rng.choices(LETTER, k=200) for _ in range(40)]
    seconds = simulate(letter_drafter(), texts, seconds_per_draft)
    assert seconds < 1.03 * sum(map(len, texts))


def test_learned_text_is_not_drafted_where_drafts_cost_more() -> None:
    texts = [[*LETTER, EOS]] * 100
    seconds = simulate(letter_drafter(), texts, seconds_per_draft=2.0)
    assert seconds < 1.03 * sum(map(len, texts))


def test_drafts_return_when_the_text_is_learned_again() -> None:
    rng = random.Random(0)
    drafter = letter_drafter()
    simulate(drafter, [rng.choices(LETTER, k=200) for _ in range(40)], seconds_per_draft=0.05)
    drafter.num_passes = drafter.num_tokens = 0
    simulate(drafter, [[*LETTER, EOS]] * 40, seconds_per_draft=0.05)
    assert drafter.num_tokens / drafter.num_passes > 4


def test_every_completion_of_a_pass_has_its_own_draft() -> None:
    drafter = letter_drafter()
    sequences = [PROMPT + LETTER[:30], [77, 5, 5], PROMPT + LETTER[:78]]
    drafter.propose([0, 1, 2], sequences, [8, 8, 8])
    drafter.observe([0, 0, 0], 1.0)  # the time of a pass without drafts
    for _ in range(3):  # what is accepted is drafted further
        first, second, third = drafter.propose([0, 1, 2], sequences, [8, 8, 8])
        assert (first, second, third) == (LETTER[30 : 30 + len(first)], [], [*LETTER[78:], EOS][: len(third)])
        drafter.observe([len(first), 0, len(third)], 1.01)
    assert len(first) == MAX_DRAFT
    assert third == [*LETTER[78:], EOS]


def test_drafts_of_many_completions_are_short() -> None:
    count = MANY_SLOTS
    drafter = letter_drafter()
    for _ in range(4):
        drafts = drafter.propose(range(count), [PROMPT + LETTER[:30]] * count, [8] * count)
        drafter.observe([len(draft) for draft in drafts], 1.0)
    assert drafts == [LETTER[30 : 30 + MAX_DRAFT_OF_MANY]] * count


def test_a_draft_is_no_longer_than_its_limit() -> None:
    drafter = letter_drafter()
    for limit in (0, 1, 3, 7, 100):
        for _ in range(20):
            draft = drafter.propose([0], [PROMPT + LETTER[:30]], [limit])[0]
            assert len(draft) <= min(limit, MAX_DRAFT)
            drafter.observe([len(draft)], 1.0)
    assert len(drafter.propose([0], [PROMPT + LETTER[:30]], [8])[0]) == 8


def test_without_an_index_the_sequence_alone_is_drafted() -> None:
    drafter = Drafter(None, eos_token_id=EOS)
    drafter.propose([0], [[5, 6, 7]], [8])
    drafter.observe([0], 1.0)
    assert drafter.propose([0], [[5, 6, 7, 8, 9, 5, 6]], [2])[0] == [7, 8]


def test_a_sequence_is_forgotten_when_it_has_ended() -> None:
    """A key that returns is another sequence: nothing of the first is drafted."""
    drafter = Drafter(None, eos_token_id=EOS)
    drafter.observe([0], 1.0)
    assert drafter.propose([0], [[5, 6, 7, 8, 9, 5, 6]], [2])[0] == [7, 8]
    drafter.observe([0], 1.0)
    drafter.propose([1], [[1, 2, 3]], [2])
    drafter.observe([0], 1.0)
    assert drafter.propose([0], [[5, 6]], [2])[0] == []


def best_by_search(chances: list[list[float]], plain: float, extra: float) -> float:
    """The most tokens a second of all lengths that there are."""
    rates = [0.0]
    for lengths in itertools.product(*(range(len(draft) + 1) for draft in chances)):
        tokens = len(chances) + sum(sum(draft[:length]) for draft, length in zip(chances, lengths, strict=True))
        rates.append(tokens / (plain + extra * sum(lengths)))
    return max(rates)


@pytest.mark.parametrize("seed", range(20))
def test_the_lengths_of_drafts_give_the_most_tokens_a_second(seed: int) -> None:
    """Every combination of lengths, tried."""
    rng = random.Random(seed)
    chances = [sorted((rng.random() for _ in range(rng.randint(0, 4))), reverse=True) for _ in range(3)]
    plain, extra = 1.0, rng.choice([0.01, 0.1, 0.5, 2.0])
    lengths = best_lengths(chances, plain, extra)
    tokens = 3 + sum(sum(draft[:length]) for draft, length in zip(chances, lengths, strict=True))
    assert tokens / (plain + extra * sum(lengths)) == pytest.approx(best_by_search(chances, plain, extra))


def test_chances_follow_what_was_accepted() -> None:
    """Half before anything is known; then (1 + accepted) / (2 + drafted), of each evidence apart."""
    acceptance = Acceptance()
    strong, weak = (False, 8, 4, 4), (False, 1, 0, 4)
    assert acceptance.chances([strong, weak]) == [0.5, 0.25]
    for _ in range(6):
        acceptance.observe([strong, strong, weak, weak], 2)
    assert acceptance.chances([strong, weak]) == [13 / 14, 13 / 14 * 1 / 8]


def test_a_pass_without_drafts_is_timed_now_and_then() -> None:
    """First of all, and then after 4 passes with drafts, 8, 12, ... at most 64."""
    times = PassTimes()
    between, count = [], 0
    for _ in range(1000):
        if times.may_draft(1):
            times.observe(1, 3, 3, 1.0)
            count += 1
        else:
            times.observe(1, None, 0, 1.0)
            between.append(count)
            count = 0
    assert between == [0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, *[60] * (len(between) - 15)]


class EveryPass(Drafter):
    """Drafts all that it finds in every pass, so that no test depends on time."""

    def __init__(self, examples: list[Example]) -> None:
        super().__init__(build_index(examples), eos_token_id=-1)
        self.times = FreeDrafts()


class FreeDrafts(PassTimes):
    """Drafted tokens cost nothing."""

    def may_draft(self, num_slots: int) -> bool:
        return True

    def estimate(self, num_slots: int) -> tuple[float, float]:
        return 1.0, 0.0

    def observe(self, num_slots: int, num_drafted: int | None, num_accepted: int, seconds: float) -> None:
        pass


@pytest.fixture(scope="module")
def model() -> FusedPhiForCausalLM:
    return load_phi2(resolve_base_model("tiny"), torch.float32)


@pytest.fixture(scope="module")
def greedy(model: FusedPhiForCausalLM) -> dict[tuple[int, ...], list[int]]:
    """Prompts of packaged records, and what transformers' generate answers to each alone."""
    tokenizer = load_tokenizer(resolve_base_model("tiny"))
    instructions = ["What is a deductible?", "Write an appeal for claim 4417.", "List what to attach.", "Why?"]
    prompts = encode_questions(tokenizer, instructions, [""] * len(instructions), max_length=512)
    native: Any = AutoModelForCausalLM.from_pretrained(resolve_base_model("tiny").folder, dtype=torch.float32)
    greedy = {}
    for prompt in prompts:
        output = native.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=-1)
        greedy[tuple(prompt)] = output[0, len(prompt) :].tolist()
    return greedy


@pytest.mark.parametrize("num_slots", [1, 3])
@pytest.mark.parametrize("learned", ["the answers", "other text", "nothing"])
def test_completions_with_drafts_are_those_of_generate(
    model: FusedPhiForCausalLM, greedy: dict[tuple[int, ...], list[int]], learned: str, num_slots: int
) -> None:
    """transformers' generate in float32, which knows no drafts."""
    texts = {"the answers": [ids[:30] for ids in greedy.values()], "other text": [list(range(50, 90))], "nothing": []}
    examples = [Example("", [*PROMPT, *text, EOS], len(PROMPT)) for text in texts[learned]]
    drafter = EveryPass(examples)
    prompts = [list(prompt) for prompt in greedy]
    completions = generate(model, prompts, eos_token_id=-1, max_new_tokens=40, max_slots=num_slots, drafts=drafter)
    assert [completion.ids for completion in completions] == list(greedy.values())
    assert drafter.num_tokens == 39 * len(prompts)  # the first token of each comes from its prompt's pass
    if learned == "the answers" and num_slots == 1:
        assert drafter.num_tokens / drafter.num_passes > 2.5


def test_a_drafted_eos_ends_the_completion(
    model: FusedPhiForCausalLM, greedy: dict[tuple[int, ...], list[int]]
) -> None:
    """EOS is here a token that generate chose, and what would follow it was drafted with it."""
    for prompt, ids in greedy.items():
        eos_token_id = ids[20]
        drafter = EveryPass([Example("", [*PROMPT, *ids], len(PROMPT))])
        (completion,) = generate(model, [list(prompt)], eos_token_id=eos_token_id, max_new_tokens=40, drafts=drafter)
        assert completion == Completion(ids[: ids.index(eos_token_id)], "stop")
