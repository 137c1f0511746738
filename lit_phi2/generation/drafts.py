"""Drafts: tokens proposed from earlier texts, several of which one pass of the model verifies.

    prompt and completion so far -> n-grams of training responses and of the sequence itself -> draft d1 d2 d3
    one pass over  t d1 d2 d3   ->  choices  c1 c2 c3 c4
    accepted: d1 if d1 = c1, then d2 if d2 = c2, ...; the token after them is a choice too  ->  1 to 4 tokens

Every token is the model's own greedy choice, so drafts decide only how many come out of a pass (retrieval-based
speculative decoding, He et al. 2023, arXiv:2311.08252; prompt lookup, Saxena 2023). A pass over more tokens computes
more, but reads the weights and the keys and values of a sequence once for all of them.

Whether a token is worth its place in a pass differs by text and machine, so both sides are measured: how often tokens
with the same evidence were accepted, and the time of a pass with drafts and without. What drafts have lost so far,
beside passes without, is bounded by 1 % of the time.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from lit_phi2.generation.ngrams import MAX_MATCH, Continuations, NgramIndex, SequenceIndex

MAX_DRAFT = 8  # tokens
MANY_SLOTS = 5  # from so many completions at once on, a draft has at most MAX_DRAFT_OF_MANY tokens
MAX_DRAFT_OF_MANY = 3  # so that attention has one shape, and its products the least rows that they take anyway
LOSS_SHARE = 0.01  # of the time, that drafts may lose while it is measured whether they pay
_FREE_PASSES = 4  # whose time may be lost from the start
_NUM_TIMES = 15  # last passes, whose median is the time of one
_INTERVAL_STEP = 4  # passes with drafts between two that are timed without, for each of those so far
_COUNT_LIMIT = 256  # where counts are halved, so that acceptance follows the text
_CERTAIN = 4  # places that agree; more say no more

# What speaks for a drafted token: whether the sequence itself or a training response has it, how many tokens before it
# match, and for training responses the fifth of the share of places that have it, and their number.
Evidence = tuple[bool, int, int, int]


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that may follow a sequence, each with what speaks for it."""

    ids: list[int]
    evidence: list[Evidence]


class Drafter:
    """Proposes drafts where they have paid.

    Args:
        index: of the training responses; None drafts from the sequences alone.
        eos_token_id: ends a draft.

    Attributes:
        num_passes, num_tokens: observed passes, and the tokens that they added.
    """

    def __init__(self, index: NgramIndex | None, *, eos_token_id: int) -> None:
        self.index = index
        self.eos_token_id = eos_token_id
        self.acceptance = Acceptance()
        self.times = PassTimes()
        self.num_passes = self.num_tokens = 0
        self._sequences: dict[int, SequenceIndex] = {}
        self._proposed: list[Draft] = []  # of the pass before `observe`; none where nothing was looked up

    def propose(
        self, keys: Sequence[int], sequences: Sequence[Sequence[int]], limits: Sequence[int]
    ) -> list[list[int]]:
        """A draft for each completion; all are empty where drafts do not pay.

        Args:
            keys: each completion's own.
            sequences: prompt and completion so far, of each.
            limits: tokens that each draft may have.
        """
        self._proposed = []
        if not self.may_pay(len(keys)):
            return [[] for _ in keys]
        drafts = self._lookup(keys, sequences, limits)
        chances = [self.acceptance.chances(draft.evidence) for draft in drafts]
        lengths = best_lengths(chances, *self.times.estimate(len(keys)))
        pairs = zip(drafts, lengths, strict=True)
        self._proposed = [Draft(draft.ids[:length], draft.evidence[:length]) for draft, length in pairs]
        return [draft.ids for draft in self._proposed]

    def may_pay(self, num_slots: int) -> bool:
        """Whether the next pass should have drafts at all: it need not be timed without, and they have not lost."""
        return self.times.may_draft(num_slots)

    def observe(self, num_accepted: Sequence[int], seconds: float) -> None:
        """Learn from the pass after `propose`.

        Args:
            num_accepted: drafted tokens that were the model's choice, of each completion.
            seconds: of proposal and pass.
        """
        self.num_passes += 1
        self.num_tokens += len(num_accepted) + sum(num_accepted)
        for draft, accepted in zip(self._proposed, num_accepted, strict=False):
            self.acceptance.observe(draft.evidence, accepted)
        num_drafted = sum(len(draft.ids) for draft in self._proposed) if self._proposed else None
        self.times.observe(len(num_accepted), num_drafted, sum(num_accepted), seconds)

    def _lookup(self, keys: Sequence[int], sequences: Sequence[Sequence[int]], limits: Sequence[int]) -> list[Draft]:
        """Of each completion the draft with more tokens to expect: the sequence's own or the training responses'."""
        longest = MAX_DRAFT_OF_MANY if len(keys) >= MANY_SLOTS else MAX_DRAFT
        self._sequences = {key: self._sequences.get(key) or SequenceIndex() for key in keys}
        found = self.index.lookup(sequences, longest) if self.index is not None else None
        drafts = []
        for row, (key, ids, limit) in enumerate(zip(keys, sequences, limits, strict=True)):
            own_ids, matched = self._sequences[key].lookup(ids, longest)
            own = Draft(own_ids, [(True, min(matched + place, MAX_MATCH), 0, 0) for place in range(len(own_ids))])
            learned = _learned_draft(found, row) if found is not None else Draft([], [])
            draft = max(learned, own, key=lambda draft: sum(self.acceptance.chances(draft.evidence)))
            length = min(limit, len(draft.ids))
            if self.eos_token_id in draft.ids[:length]:
                length = draft.ids.index(self.eos_token_id) + 1
            drafts.append(Draft(draft.ids[:length], draft.evidence[:length]))
        return drafts


def _learned_draft(found: Continuations, row: int) -> Draft:
    """The continuation of one sequence, with how long and how unanimously it was found."""
    matched, support = int(found.matched[row]), found.support[row].tolist()
    length = support.index(0) if 0 in support else len(support)
    evidence = [
        (False, min(matched + place, MAX_MATCH), int(4.999 * share), min(number, _CERTAIN))
        for place, (share, number) in enumerate(zip(found.shares[row].tolist(), support[:length], strict=False))
    ]
    return Draft(found.ids[row, :length].tolist(), evidence)


def best_lengths(chances: Sequence[Sequence[float]], plain: float, extra: float) -> list[int]:
    """How many tokens of each draft give the most tokens a second.

    Args:
        chances: of each draft, how likely each token and all before it are accepted.
        plain: seconds of a pass without drafts.
        extra: seconds that a drafted token adds.

    >>> best_lengths([[0.9, 0.8], [0.3]], plain=1.0, extra=0.2)
    [2, 0]
    """
    lengths = [0] * len(chances)
    tokens, seconds = float(len(chances)), plain
    for chance, number in sorted(((c, k) for k, draft in enumerate(chances) for c in draft), reverse=True):
        if chance * seconds <= extra * tokens:
            break
        tokens, seconds = tokens + chance, seconds + extra
        lengths[number] += 1
    return lengths


class Acceptance:
    """How often drafted tokens were the model's choice, by what spoke for them."""

    def __init__(self) -> None:
        self._counts: dict[Evidence, list[float]] = {}  # accepted, drafted

    def chances(self, evidence: Sequence[Evidence]) -> list[float]:
        """How likely each token of a draft and all before it are accepted; half of each before anything is known."""
        chances, chance = [], 1.0
        for each in evidence:
            accepted, drafted = self._counts.get(each, (1.0, 2.0))
            chance *= accepted / drafted
            chances.append(chance)
        return chances

    def observe(self, evidence: Sequence[Evidence], num_accepted: int) -> None:
        """Count the tokens of a draft up to the first that was refused: only what came before it was the model's."""
        for place, each in enumerate(evidence[: num_accepted + 1]):
            counts = self._counts.setdefault(each, [1.0, 2.0])
            counts[0] += place < num_accepted
            counts[1] += 1
            if counts[1] > _COUNT_LIMIT:
                counts[:] = counts[0] / 2, counts[1] / 2


class PassTimes:
    """The time of a pass by the number of completions, without drafts and for each drafted token; what drafts lost."""

    def __init__(self) -> None:
        self._plain: dict[int, deque[float]] = {}  # by the size of the pass; of passes without drafts
        self._extra: dict[int, deque[float]] = {}  # of a drafted token, in passes with drafts
        self._num_drafting: dict[int, int] = {}  # since one without drafts was timed
        self._elapsed = self._lost = 0.0

    def may_draft(self, num_slots: int) -> bool:
        """Whether drafts have lost no more than they may, and no pass without them is to be timed."""
        times = self._plain.get(_size(num_slots), ())
        is_due = self._num_drafting.get(_size(num_slots), 0) >= _INTERVAL_STEP * len(times)
        return not is_due and self._lost <= LOSS_SHARE * self._elapsed + _FREE_PASSES * median(times)

    def estimate(self, num_slots: int) -> tuple[float, float]:
        """Seconds of a pass without drafts, of which at least one was timed, and for each drafted token."""
        size = _size(num_slots)
        plain = median(self._plain[size])
        extra = self._extra.get(size)
        return plain, max(0.0, median(extra)) if extra else plain / (16 * num_slots)

    def observe(self, num_slots: int, num_drafted: int | None, num_accepted: int, seconds: float) -> None:
        """Count a pass; num_drafted is None where no draft was looked up."""
        size = _size(num_slots)
        self._elapsed += seconds
        if num_drafted is None:
            self._plain.setdefault(size, deque(maxlen=_NUM_TIMES)).append(seconds)
            self._num_drafting[size] = 0
            return
        self._num_drafting[size] = self._num_drafting.get(size, 0) + 1
        plain = median(self._plain[size])
        if num_drafted:
            self._extra.setdefault(size, deque(maxlen=_NUM_TIMES)).append((seconds - plain) / num_drafted)
        # What was gained long ago allows no loss today.
        self._lost = max(0.0, self._lost + seconds - plain * (1 + num_accepted / num_slots))


def _size(num_slots: int) -> int:
    """Passes of 1, 2, 3 to 4, 5 to 8, ... completions are alike."""
    return (num_slots - 1).bit_length()
