"""Drafts: tokens proposed from earlier texts, several of which one pass of the model verifies.

    prompt and completion so far -> n-grams of training responses and of the prompt -> draft d1 d2 d3
    one pass over  t d1 d2 d3   ->  choices  c1 c2 c3 c4
    accepted: d1 if d1 = c1, then d2 if d2 = c2, ...; the token after them is a choice too  ->  1 to 4 tokens

Every token is the model's own greedy choice, so drafts decide only how many come out of a pass (retrieval-based
speculative decoding, He et al. 2023, arXiv:2311.08252; prompt lookup, Saxena 2023). A pass over several tokens may
round in another way than one over a single token, so either may be chosen of two tokens whose logits differ by rounding
alone. Where weights are what a pass reads, as with few slots, a pass over 9 tokens takes little longer than one over 1.

Whether drafts pay differs by text and machine, so both sides are measured: how often the tokens of a match of so many
tokens were accepted, and the time of a pass with so many drafts. What drafts have lost so far, beside passes without,
is bounded by 1 % of the time.
"""

from collections import deque
from collections.abc import Sequence
from statistics import median

from lit_phi2.generation.ngrams import MAX_MATCH, NgramIndex, lookup_prompt

DRAFT_LENGTHS = (0, 2, 4, 8)  # the most tokens of a draft, among which is chosen
MAX_DRAFT_SLOTS = 4  # with more completions at once a pass computes more than it reads
LOSS_SHARE = 0.01  # of the time, that drafts may lose while it is measured whether they pay
_FREE_PASSES = 4  # whose time may be lost from the start
_MARGIN = 1.1  # by which drafts must be faster than none once their loss is used up
_PASS_TIMES = 15  # last ones, whose median is the time of a pass
_COUNT_LIMIT = 256  # where counts are halved, so that acceptance follows the text


class Drafter:
    """Proposes drafts where they have paid.

    Args:
        index: of the training responses; None drafts from the prompt alone.
        eos_token_id: ends a draft.
    """

    def __init__(self, index: NgramIndex | None, *, eos_token_id: int) -> None:
        self.index = index
        self.eos_token_id = eos_token_id
        self.meter = Meter()
        self.num_passes = 0
        self.num_tokens = 0
        self._matches: list[int] = []
        self._lengths: list[int] = []
        self._num_drafted = 0

    def propose(self, contexts: Sequence[Sequence[int]], limits: Sequence[int]) -> list[list[int]]:
        """A draft for each completion; all are empty where drafts do not pay.

        Args:
            contexts: prompt and completion so far, of each completion.
            limits: tokens that each draft may have.
        """
        self._matches, self._lengths, self._num_drafted = [], [], 0
        if len(contexts) > MAX_DRAFT_SLOTS or not self.meter.may_pay(len(contexts)):
            return [[] for _ in contexts]
        drafts = []
        for ids, limit in zip(contexts, limits, strict=True):
            draft, matched = self._lookup(ids, min(limit, DRAFT_LENGTHS[-1]))
            drafts.append(draft)
            self._matches.append(matched)
            self._lengths.append(len(draft))
        self._num_drafted = self.meter.choose(self._matches, self._lengths)
        return [draft[: self._num_drafted] for draft in drafts]

    def observe(self, num_accepted: Sequence[int], seconds: float) -> None:
        """Learn from the pass after `propose`.

        Args:
            num_accepted: drafted tokens that were the model's choice, of each completion.
            seconds: of proposal and pass.
        """
        self.num_passes += 1
        self.num_tokens += len(num_accepted) + sum(num_accepted)
        self.meter.observe(self._matches, self._lengths, num_accepted, self._num_drafted, seconds)

    def _lookup(self, ids: Sequence[int], count: int) -> tuple[list[int], int]:
        """The draft of the longer match; of equally long ones the prompt's, which is about the same case."""
        draft, matched = self.index.lookup(ids, count) if self.index is not None else ([], 0)
        prompt_draft, prompt_matched = lookup_prompt(ids, count)
        if prompt_matched >= max(matched, 1):
            draft, matched = prompt_draft, prompt_matched
        if self.eos_token_id in draft:
            draft = draft[: draft.index(self.eos_token_id) + 1]
        return draft, matched


class Meter:
    """Which length of drafts gives the most tokens a second, by what was measured so far."""

    def __init__(self) -> None:
        # By the number of tokens that matched before the drafted one; half are accepted before anything is measured.
        self._accepted = [1.0] * (MAX_MATCH + 1)
        self._drafted = [2.0] * (MAX_MATCH + 1)
        self._times: dict[tuple[int, int], deque[float]] = {}  # by slots and length of the drafts
        self._pass_time: dict[tuple[int, int], float] = {}  # their medians
        self._elapsed = 0.0
        self._lost = 0.0

    def may_pay(self, num_slots: int) -> bool:
        """Whether any match could be worth a draft; otherwise none is looked up."""
        plain = self.pass_time(num_slots, 0)
        if plain is None:
            return False
        if self._lost <= self._allowed_loss(plain):
            return True
        rate = max(a / d for a, d in zip(self._accepted, self._drafted, strict=True))
        return any(
            sum(rate**place for place in range(n + 1)) / self._estimate(num_slots, n, plain) > _MARGIN / plain
            for n in DRAFT_LENGTHS[1:]
        )

    def choose(self, matches: Sequence[int], lengths: Sequence[int]) -> int:
        """The most tokens that a draft of the next pass has.

        Args:
            matches: tokens of each completion that matched.
            lengths: tokens that each could draft.
        """
        num_slots = len(matches)
        useful = max(lengths, default=0)
        options = [n for n in DRAFT_LENGTHS if not n or n < 2 * useful]
        if len(options) < 2:
            return 0
        plain = self.pass_time(num_slots, 0)
        if plain is None:  # the time of a pass without drafts comes first
            return 0
        rates = {}
        for num_drafted in options:
            tokens = sum(self.expected(m, min(n, num_drafted)) for m, n in zip(matches, lengths, strict=True))
            rates[num_drafted] = tokens / self._estimate(num_slots, num_drafted, plain)
        best = max(options, key=lambda num_drafted: rates[num_drafted])
        if self._lost > self._allowed_loss(plain):
            return best if rates[best] > _MARGIN * rates[0] else 0
        return best if best else options[1]  # tried, so that what is known of it stays true

    def expected(self, matched: int, num_drafted: int) -> float:
        """Tokens of a pass, the model's own one included, with a draft after a match of so many tokens."""
        tokens = likelihood = 1.0
        for place in range(num_drafted):
            match = _match_at(matched, place)
            likelihood *= self._accepted[match] / self._drafted[match]
            tokens += likelihood
        return tokens

    def _estimate(self, num_slots: int, num_drafted: int, plain: float) -> float:
        """Seconds of a pass; before one was measured, a little more than without drafts."""
        measured = self.pass_time(num_slots, num_drafted)
        return plain * (1 + num_drafted / 16) if measured is None else measured

    def _allowed_loss(self, plain: float) -> float:
        """Seconds that drafts may have lost before only those are tried that are clearly better than none."""
        return LOSS_SHARE * self._elapsed + _FREE_PASSES * plain

    def pass_time(self, num_slots: int, num_drafted: int) -> float | None:
        """Median seconds of the last passes of this size."""
        return self._pass_time.get((num_slots, num_drafted))

    def observe(
        self,
        matches: Sequence[int],
        lengths: Sequence[int],
        num_accepted: Sequence[int],
        num_drafted: int,
        seconds: float,
    ) -> None:
        """Count the drafts of a pass that were accepted, and its time."""
        num_slots = len(num_accepted)
        self._elapsed += seconds
        if num_slots > MAX_DRAFT_SLOTS:
            return
        times = self._times.setdefault((num_slots, num_drafted), deque(maxlen=_PASS_TIMES))
        times.append(seconds)
        self._pass_time[num_slots, num_drafted] = median(times)
        if not num_drafted:
            return
        for matched, length, accepted in zip(matches, lengths, num_accepted, strict=True):
            # A place counts only if all tokens before it were accepted: likelihoods are those of the next token.
            for place in range(min(length, num_drafted, accepted + 1)):
                self._count(_match_at(matched, place), place < accepted)
        plain = self.pass_time(num_slots, 0)
        if plain is not None:
            # What was gained long ago allows no loss today.
            self._lost = max(0.0, self._lost + seconds - plain * (1 + sum(num_accepted) / num_slots))

    def _count(self, match: int, accepted: bool) -> None:
        self._drafted[match] += 1
        self._accepted[match] += accepted
        if self._drafted[match] > _COUNT_LIMIT:
            self._drafted[match] /= 2
            self._accepted[match] /= 2


def _match_at(matched: int, place: int) -> int:
    """Tokens that match before a place of a draft, if those of the draft before it were accepted."""
    return min(matched + place, MAX_MATCH)
