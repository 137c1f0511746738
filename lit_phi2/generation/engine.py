"""Engine: greedy completions of prompts, the same for samples during fit, for test and for predict.

    waiting   e f g                     slot 0   a a a a c c c E | e e c c c ...
    slots     a b c d    -> step() ->   slot 1   b b c c c c c c c c c c c E | f ...

A slot holds one sequence. When its completion ends, with EOS (stop) or at its limit (length), the next waiting prompt
takes the slot at once: its prompt is prefilled in one pass with those of other free slots, and from then on every pass
adds a token to every slot. A prompt that begins like one in a slot copies the keys and values of what they share.

The model is only read: weights, modes and the random number generator stay as they are.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from lit_phi2.errors import InputError
from lit_phi2.generation.capacity import choose_num_slots
from lit_phi2.generation.decoder import Decoder, Segment
from lit_phi2.generation.drafts import MAX_DRAFT_SLOTS, Drafter
from lit_phi2.generation.kv_cache import KVCache, round_up
from lit_phi2.generation.weights import prepare_weights
from lit_phi2.model.phi2 import FusedPhiForCausalLM

MAX_PREFILL_TOKENS = 2048  # of one pass, unless a prompt alone is longer
MIN_SHARED_PREFIX = 16  # tokens; fewer are computed again as fast as they are copied


@dataclass(frozen=True, slots=True)
class Completion:
    """What the model generated for a prompt.

    Attributes:
        ids: new tokens, without the prompt and without EOS.
        finish_reason: stop after EOS, length at max_new_tokens.
    """

    ids: list[int]
    finish_reason: Literal["stop", "length"]


@dataclass(slots=True)
class _Sequence:
    """A prompt with its completion so far."""

    key: int
    ids: list[int]
    prompt_length: int
    max_length: int

    def completion(self, finish_reason: Literal["stop", "length"]) -> Completion:
        return Completion(self.ids[self.prompt_length :], finish_reason)


class Engine:
    """Greedy decoding with continuous batching.

    Args:
        model: with or without adapters in its layers; those that are disabled count as absent.
        eos_token_id: ends a completion.
        max_new_tokens: upper bound on the tokens of a completion; the prompt does not count.
        max_slots: sequences at the same time; None for what the memory and the device suggest.
        use_adapter: False for the base alone.
        expected_prompts: how many will be submitted, to judge whether a merged copy pays; None for many.
        drafts: proposes tokens that a pass checks together.

    Attributes:
        on_tokens: called with the key and the new tokens of a completion as soon as they are chosen.
        num_passes, num_tokens: decode passes, and tokens that they added (EOS included), so far.
    """

    def __init__(
        self,
        model: FusedPhiForCausalLM,
        *,
        eos_token_id: int,
        max_new_tokens: int,
        max_slots: int | None = None,
        use_adapter: bool = True,
        expected_prompts: int | None = None,
        drafts: Drafter | None = None,
    ) -> None:
        self.eos_token_id, self.max_new_tokens, self.max_slots = eos_token_id, max_new_tokens, max_slots
        self.drafts = drafts
        self.on_tokens: Callable[[int, list[int]], None] | None = None
        self.num_positions: int = model.config.max_position_embeddings
        self.num_passes = self.num_tokens = 0
        num_rows = choose_num_slots(max_slots, expected_prompts, model.lm_head.weight.device)
        num_passes = None if expected_prompts is None else max_new_tokens * -(-expected_prompts // num_rows)
        weights = prepare_weights(model, use_adapter=use_adapter, num_rows=num_rows, num_passes=num_passes)
        self._decoder = Decoder(model, weights)
        self._queue: deque[_Sequence] = deque()
        self._slots: list[_Sequence | None] = []
        self._resident: list[list[int]] = []  # ids whose keys and values each slot holds, also after they ended
        self._cache: KVCache | None = None

    @property
    def waiting(self) -> int:
        """Prompts that have no slot yet."""
        return len(self._queue)

    @property
    def active(self) -> int:
        """Prompts in slots."""
        return sum(sequence is not None for sequence in self._slots)

    @property
    def num_slots(self) -> int:
        """Sequences at the same time; 0 before the first step."""
        return len(self._slots)

    def submit(self, key: int, prompt: Sequence[int], max_new_tokens: int | None = None) -> None:
        """Queue a prompt.

        Args:
            key: names its completion.
            prompt: token ids, at least one.
            max_new_tokens: of this completion; None for the engine's.

        Raises:
            InputError: prompt and completion together are longer than the positions of the base.
        """
        max_length = len(prompt) + (self.max_new_tokens if max_new_tokens is None else max_new_tokens)
        if max_length > self.num_positions:
            raise InputError(
                f"a prompt has {len(prompt)} tokens and its completion up to {max_length - len(prompt)}; the base has "
                f"{self.num_positions} positions. Shorten the prompt, or lower max_new_tokens."
            )
        self._queue.append(_Sequence(key, list(prompt), len(prompt), max_length))

    def step(self) -> list[tuple[int, Completion]]:
        """Fill free slots with waiting prompts, then add to every slot; returns the completions that ended."""
        ended: list[tuple[int, Completion]] = []
        while self._queue and (admitted := self._admit()):
            self._prefill(admitted, ended)
        self._decode(ended)
        return ended

    # Prefill

    def _admit(self) -> list[int]:
        """Give free slots to waiting prompts, of at most MAX_PREFILL_TOKENS together; returns the slots."""
        self._make_room()
        slots, num_tokens = [], 0
        for slot in range(self.num_slots):
            if self._slots[slot] is not None or not self._queue:
                continue
            sequence = self._queue[0]
            num_tokens += len(sequence.ids)
            if (slots and num_tokens > MAX_PREFILL_TOKENS) or sequence.max_length > self._capacity:
                break
            self._slots[slot] = self._queue.popleft()
            slots.append(slot)
        return slots

    @property
    def _capacity(self) -> int:
        return 0 if self._cache is None else self._cache.capacity

    def _make_room(self) -> None:
        """Allocate the cache, or enlarge it for a longer prompt."""
        capacity = round_up(max(sequence.max_length for sequence in self._queue))
        if capacity <= self._capacity:
            return
        decoder = self._decoder
        if self._cache is None:
            num_slots = choose_num_slots(
                self.max_slots, len(self._queue), decoder.device, decoder.cache_shape.num_bytes(1, capacity)
            )
            self._cache = KVCache(decoder.cache_shape, num_slots, capacity, decoder.device)
            self._slots, self._resident = [None] * num_slots, [[] for _ in range(num_slots)]
        else:
            self._cache = self._cache.grow(capacity)

    def _prefill(self, slots: list[int], ended: list[tuple[int, Completion]]) -> None:
        """Compute the prompts of slots, and choose the first token of each."""
        assert self._cache is not None
        previous = [self._resident[slot] for slot in slots]
        for slot in slots:
            self._resident[slot] = []  # is overwritten in this pass, so nothing may be copied from it
        ids: list[int] = []
        segments, last_tokens = [], []
        for slot, own in zip(slots, previous, strict=True):
            sequence = self._slots[slot]
            assert sequence is not None
            start, source = self._shared_prefix(sequence.ids, slot, own)
            segments.append(Segment(slot, start, len(sequence.ids), source))
            ids += sequence.ids[start:]
            last_tokens.append(len(ids) - 1)
            self._resident[slot] = sequence.ids
        chosen = self._decoder.forward(self._cache, ids, segments, last_tokens)
        for slot, token in zip(slots, chosen, strict=True):
            self._append(slot, [token], ended)

    def _shared_prefix(self, ids: list[int], slot: int, own: list[int]) -> tuple[int, int | None]:
        """How many first tokens a slot holds already, and which; None for the prompt's own slot."""
        best, source = _common_prefix(ids, own), None
        for other, resident in enumerate(self._resident):
            if other != slot and (length := _common_prefix(ids, resident)) > best:
                best, source = length, other
        best = min(best, len(ids) - 1)  # the last token is computed: its hidden state chooses the first new one
        return (best, source) if best >= MIN_SHARED_PREFIX else (0, None)

    # Decoding

    def _decode(self, ended: list[tuple[int, Completion]]) -> None:
        """One pass over all slots in use, which checks a draft for each where drafts pay."""
        active = {slot: sequence for slot, sequence in enumerate(self._slots) if sequence is not None}
        if not active:
            return
        assert self._cache is not None
        start = time.perf_counter()
        drafts = self._draft(list(active.values()))
        ids: list[int] = []
        segments = []
        for (slot, sequence), draft in zip(active.items(), drafts, strict=True):
            end = len(sequence.ids) + len(draft)
            segments.append(Segment(slot, len(sequence.ids) - 1, end))
            ids += [sequence.ids[-1], *draft]
        chosen = self._decoder.forward(self._cache, ids, segments)
        seconds = time.perf_counter() - start
        self.num_passes += 1
        accepted, first = [], 0
        for slot, draft in zip(active, drafts, strict=True):
            # A token is the model's choice if all drafted tokens before it were.
            num_accepted = _common_prefix(draft, chosen[first:])
            self.num_tokens += self._append(slot, chosen[first : first + num_accepted + 1], ended)
            accepted.append(num_accepted)
            first += 1 + len(draft)
        if self.drafts is not None and len(active) <= MAX_DRAFT_SLOTS:
            self.drafts.observe(accepted, seconds)

    def _draft(self, sequences: list[_Sequence]) -> list[list[int]]:
        """Tokens that may follow each sequence, with the one after them within its limit."""
        if self.drafts is None or len(sequences) > MAX_DRAFT_SLOTS:
            return [[] for _ in sequences]
        limits = [sequence.max_length - len(sequence.ids) - 1 for sequence in sequences]
        return self.drafts.propose([sequence.ids for sequence in sequences], limits)

    def _append(self, slot: int, tokens: list[int], ended: list[tuple[int, Completion]]) -> int:
        """Append tokens to the sequence of a slot, up to EOS; returns how many, EOS included."""
        sequence = self._slots[slot]
        assert sequence is not None
        stops = self.eos_token_id in tokens
        kept = tokens[: tokens.index(self.eos_token_id)] if stops else tokens
        sequence.ids.extend(kept)
        if kept and self.on_tokens is not None:
            self.on_tokens(sequence.key, kept)
        if stops or len(sequence.ids) == sequence.max_length:
            ended.append((sequence.key, sequence.completion("stop" if stops else "length")))
            # Keys and values of the last token, or of tokens after EOS, were not written.
            self._resident[slot] = sequence.ids[: sequence.prompt_length]
            self._slots[slot] = None
        return len(kept) + stops


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))


def generate(
    model: FusedPhiForCausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    eos_token_id: int,
    max_new_tokens: int,
    max_slots: int | None = None,
    use_adapter: bool = True,
    drafts: Drafter | None = None,
) -> list[Completion]:
    """Complete prompts greedily.

    Args:
        model: with or without adapters in its layers.
        prompts: token ids, at least one each; lengths may differ.
        eos_token_id: ends a completion.
        max_new_tokens: upper bound on the tokens of a completion; the prompt does not count.
        max_slots, use_adapter, drafts: see Engine.

    Returns:
        One completion per prompt, in order.

    Raises:
        InputError: a prompt and its completion are longer than the positions of the base.
    """
    if not prompts:
        return []
    engine = Engine(
        model,
        eos_token_id=eos_token_id,
        max_new_tokens=max_new_tokens,
        max_slots=max_slots,
        use_adapter=use_adapter,
        expected_prompts=len(prompts),
        drafts=drafts,
    )
    for key, prompt in enumerate(prompts):
        engine.submit(key, prompt)
    completions: dict[int, Completion] = {}
    while engine.waiting or engine.active:
        completions.update(engine.step())
    return [completions[key] for key in range(len(prompts))]
