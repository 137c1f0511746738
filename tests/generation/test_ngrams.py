"""N-grams against a search through all texts, token by token."""

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lit_phi2.generation.ngrams import MAX_MATCH, MAX_TOKEN_ID, NgramIndex, SequenceIndex, build_index
from lit_phi2.types import Example

EOS = 0


def random_examples(seed: int, *, count: int = 40, vocabulary: int = 6) -> list[Example]:
    """Few different tokens, so that long matches occur."""
    rng = random.Random(seed)
    examples = []
    for number in range(count):
        prompt = rng.choices(range(1, vocabulary), k=rng.randint(1, 12))
        response = rng.choices(range(1, vocabulary), k=rng.randint(0, 20))
        examples.append(Example(str(number), [*prompt, *response, EOS], len(prompt)))
    return examples


def joined(examples: list[Example]) -> tuple[list[int], list[int]]:
    """The tokens as the module's drawing shows them, and the positions of responses."""
    tokens: list[int] = []
    positions: list[int] = []
    for example in examples:
        begin = max(0, example.prompt_length - MAX_MATCH)
        start = len(tokens) + example.prompt_length - begin
        tokens += example.ids[begin:]
        positions += range(start, len(tokens))
    return tokens, positions


def search(tokens: list[int], positions: list[int], ids: list[int], count: int) -> tuple[list[int], int]:
    """The longest match by comparing every position, and of its continuations the most frequent one."""

    def matched(position: int) -> int:
        length = 0
        while length < min(MAX_MATCH, position, len(ids)) and tokens[position - 1 - length] == ids[-1 - length]:
            length += 1
        return length

    longest = max((matched(position) for position in positions), default=0)
    if not longest:
        return [], 0
    found = [position for position in positions if matched(position) == longest]
    continuation: list[int] = []
    while len(continuation) < count and found:
        counts = Counter(tokens[position] for position in found)
        continuation.append(max(counts, key=lambda token: counts[token]))
        found = [p + 1 for p in found if tokens[p] == continuation[-1] and p + 1 < len(tokens)]
    return continuation, longest


def lookup(index: NgramIndex, ids: list[int], count: int) -> tuple[list[int], int]:
    """The draft of one sequence, and how many of its last tokens matched."""
    found = index.lookup([ids], count)
    length = int((found.support[0] > 0).sum())
    return found.ids[0, :length].tolist(), int(found.matched[0])


@pytest.mark.parametrize("seed", range(5))
def test_lookup_finds_what_a_search_of_all_text_finds(seed: int) -> None:
    """Either of equally frequent tokens may be drafted, so their counts are compared; many matches are sampled."""
    examples = random_examples(seed)
    index, (tokens, positions) = build_index(examples), joined(examples)
    rng = random.Random(seed)
    for _ in range(60):
        ids = rng.choices(range(7), k=rng.randint(1, 12))
        draft, matched = lookup(index, ids, 1)
        expected, expected_matched = search(tokens, positions, ids, 1)
        assert matched == expected_matched
        followers = Counter(
            tokens[p] for p in positions if tokens[max(0, p - matched) : p] == ids[len(ids) - matched :]
        )
        if followers.total() <= 16:
            assert [followers[token] for token in draft] == [followers[token] for token in expected]
        assert all(token in followers for token in draft)


def test_a_text_that_was_learned_is_drafted_to_its_end() -> None:
    learned = list(range(1, 40))
    index = build_index([Example("a", [*learned, EOS], 5), Example("b", [50, 51, 52, EOS], 2)])
    assert lookup(index, learned[:20], 8) == (learned[20:28], MAX_MATCH)
    assert lookup(index, [50, 51], 8)[0] == [52, EOS]
    assert lookup(index, [60], 8) == ([], 0)


def test_no_token_of_a_prompt_is_drafted() -> None:
    """A prompt of 3 tokens before a response of 2; what follows the first token is another token of the prompt."""
    index = build_index([Example("a", [11, 12, 13, 14, 15, EOS], 3)])
    assert lookup(index, [11], 8) == ([], 0)
    assert sorted({token for n in range(20) for token in lookup(index, [n], 1)[0]}) == [EOS, 14, 15]


def test_the_index_holds_two_numbers_a_token() -> None:
    examples = random_examples(1)
    index, (tokens, positions) = build_index(examples), joined(examples)
    assert (index.tokens.nbytes, index.order.nbytes) == (4 * len(tokens), 4 * len(positions))
    assert (
        build_index(examples, max_tokens=50).tokens.tolist()
        == tokens[: len(build_index(examples, max_tokens=50).tokens)]
    )
    assert 50 <= len(build_index(examples, max_tokens=50).tokens) < 50 + 40


def test_a_saved_index_answers_the_same(tmp_path: Path) -> None:
    index = build_index(random_examples(2))
    index.save(tmp_path / "index.npz")
    loaded = NgramIndex.load(tmp_path / "index.npz")
    assert loaded is not None
    assert all(lookup(loaded, [a, b], 8) == lookup(index, [a, b], 8) for a in range(4) for b in range(4))


@pytest.mark.parametrize("content", [b"", b"no zip file", b"PK\x03\x04"], ids=["empty", "text", "cut"])
def test_a_file_that_is_no_index_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "index.npz").write_bytes(content)
    assert NgramIndex.load(tmp_path / "index.npz") is None


def test_positions_outside_the_text_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "index.npz", tokens=np.zeros(3, np.int32), order=np.array([0, 3], np.int32))
    assert NgramIndex.load(tmp_path / "index.npz") is None


@pytest.mark.parametrize("seed", range(5))
def test_shares_and_support_are_counts_of_places(seed: int) -> None:
    """Every place of the longest match, followed token by token."""
    examples = random_examples(seed, count=12)
    index, (tokens, positions) = build_index(examples), joined(examples)
    rng = random.Random(seed)
    for _ in range(40):
        ids = rng.choices(range(1, 6), k=9)
        found = index.lookup([ids], 4)
        matched = search(tokens, positions, ids, 1)[1]
        places = [p for p in positions if p >= matched and tokens[p - matched : p] == ids[len(ids) - matched :]]
        if not matched or len(places) > 16:
            continue
        for step, (token, share, support) in enumerate(
            zip(found.ids[0], found.shares[0], found.support[0], strict=True)
        ):
            places = [p for p in places if p + step < len(tokens)]
            assert support == len(places)
            if places:
                assert share == sum(tokens[p + step] == token for p in places) / len(places)
            places = [p for p in places if tokens[p + step] == token]


def test_sequences_together_find_what_each_finds_alone() -> None:
    index = build_index(random_examples(3))
    rng = random.Random(3)
    sequences = [rng.choices(range(7), k=rng.randint(1, 12)) for _ in range(32)]
    together = index.lookup(sequences, 5)
    for row, ids in enumerate(sequences):
        alone = index.lookup([ids], 5)
        assert together.ids[row].tolist() == alone.ids[0].tolist()
        assert together.support[row].tolist() == alone.support[0].tolist()
        assert together.shares[row].tolist() == alone.shares[0].tolist()
        assert together.matched[row] == alone.matched[0]


def test_a_token_that_is_too_large_to_compare_is_refused() -> None:
    assert lookup(build_index([Example("a", [1, MAX_TOKEN_ID, 2], 1)]), [MAX_TOKEN_ID], 1) == ([2], 1)
    with pytest.raises(ValueError, match=str(MAX_TOKEN_ID + 1)):
        build_index([Example("a", [1, MAX_TOKEN_ID + 1, 2], 1)])


@pytest.mark.parametrize("seed", range(5))
def test_a_sequence_is_searched_for_its_last_two_tokens(seed: int) -> None:
    """A search from the end through every earlier place, while the sequence grows."""
    rng = random.Random(seed)
    ids: list[int] = []
    index = SequenceIndex()
    for _ in range(60):
        expected: tuple[list[int], int] = ([], 0)
        starts = [n + 2 for n in range(len(ids) - 2) if ids[n : n + 2] == ids[-2:]]
        if starts:
            length = 2
            while length < min(MAX_MATCH, starts[-1]) and ids[starts[-1] - length - 1] == ids[-length - 1]:
                length += 1
            expected = (ids[starts[-1] :][:3], length)
        assert index.lookup(ids, 3) == expected
        ids += rng.choices(range(4), k=rng.randint(1, 4))


def test_no_examples_make_an_index_without_answers() -> None:
    assert lookup(build_index([]), [1, 2], 8) == ([], 0)
