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

from lit_phi2.errors import InputError, NonFiniteError
from lit_phi2.generation.cache_attention import Segment
from lit_phi2.generation.capacity import choose_num_slots
from lit_phi2.generation.decoder import NOT_FINITE, Decoder
from lit_phi2.generation.drafts import Drafter
from lit_phi2.generation.kv_cache import KVCache, round_up
from lit_phi2.generation.slots import Generated, Slots, common_prefix
from lit_phi2.generation.static_decoder import StaticDecoder
from lit_phi2.generation.weights import prepare_weights
from lit_phi2.model.phi2 import FusedPhiForCausalLM

MAX_DRAFT_SLOTS = 4  # on a GPU: passes that check drafts for more are not worth leaving the recorded one for
MAX_PREFILL_TOKENS = 2048  # of one pass, unless a prompt alone is longer


@dataclass(frozen=True, slots=True)
class Completion:
    """What the model generated for a prompt.

    Attributes:
        ids: new tokens, without the prompt and without EOS.
        finish_reason: stop after EOS, length at max_new_tokens.
    """

    ids: list[int]
    finish_reason: Literal["stop", "length"]


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
        locate: names the prompt of a key in an error.
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
        self.expected_prompts, self.drafts = expected_prompts, drafts
        self.on_tokens: Callable[[int, list[int]], None] | None = None
        self.locate: Callable[[int], str] = lambda key: f"prompt {key}"
        self.num_positions: int = model.config.max_position_embeddings
        self.num_passes = self.num_tokens = 0
        num_rows = choose_num_slots(max_slots, expected_prompts, model.lm_head.weight.device)
        num_passes = None if expected_prompts is None else max_new_tokens * -(-expected_prompts // num_rows)
        weights = prepare_weights(model, use_adapter=use_adapter, num_rows=num_rows, num_passes=num_passes)
        self.decoder = Decoder(model, weights)
        self._queue: deque[Generated] = deque()
        self._slots = Slots(0)
        self._cache: KVCache | None = None
        self._static_decoder: StaticDecoder | None = None

    @property
    def waiting(self) -> int:
        """Prompts that have no slot yet."""
        return len(self._queue)

    @property
    def active(self) -> int:
        """Prompts in slots."""
        return len(self._slots.active())

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
        self._queue.append(Generated(key, list(prompt), len(prompt), max_length))

    def step(self) -> list[tuple[int, Completion]]:
        """Fill free slots with waiting prompts, then add to every slot; returns the completions that ended."""
        ended: list[tuple[int, Completion]] = []
        while self._queue and (admitted := self._admit()):
            self._prefill(admitted, ended)
        self._decode(ended)
        return ended

    # Prefill

    def _admit(self) -> list[tuple[int, Generated]]:
        """Free slots for waiting prompts, of at most MAX_PREFILL_TOKENS together."""
        self._make_room()
        admitted: list[tuple[int, Generated]] = []
        num_tokens = 0
        for slot in self._slots.free():
            num_tokens += len(self._queue[0].ids) if self._queue else 0
            if not self._queue or (admitted and num_tokens > MAX_PREFILL_TOKENS):
                break
            admitted.append((slot, self._queue.popleft()))
        return admitted

    def _make_room(self) -> None:
        """Allocate the cache, or enlarge it for a longer prompt."""
        capacity = round_up(max(sequence.max_length for sequence in self._queue))
        decoder = self.decoder
        if self._cache is None:
            slot_bytes = decoder.cache_shape.num_bytes(1, capacity)
            num_slots = choose_num_slots(self.max_slots, self.expected_prompts, decoder.device, slot_bytes)
            self._cache = KVCache(decoder.cache_shape, num_slots, capacity, decoder.device)
            self._slots = Slots(num_slots)
        elif capacity > self._cache.capacity:
            self._cache, self._static_decoder = self._cache.enlarged(capacity), None
        if decoder.device.type != "cpu" and self._static_decoder is None:
            self._static_decoder = StaticDecoder(decoder, self._cache)

    def _prefill(self, admitted: list[tuple[int, Generated]], ended: list[tuple[int, Completion]]) -> None:
        """Compute prompts in their slots, and choose the first token of each."""
        assert self._cache is not None
        slots, sequences = [slot for slot, _ in admitted], [sequence for _, sequence in admitted]
        ids: list[int] = []
        segments, last_tokens = [], []
        for (start, source), (slot, sequence) in zip(self._slots.fill(slots, sequences), admitted, strict=True):
            segments.append(Segment(slot, start, len(sequence.ids), source, is_prompt=True))
            ids += sequence.ids[start:]
            last_tokens.append(len(ids) - 1)
        chosen = self.decoder.forward(self._cache, ids, segments, last_tokens)
        for (slot, sequence), token in zip(admitted, chosen, strict=True):
            self._append(slot, sequence, [token], ended)

    # Decoding

    def _decode(self, ended: list[tuple[int, Completion]]) -> None:
        """One pass over all slots in use, which checks a draft for each where drafts pay."""
        active = self._slots.active()
        if not active:
            return
        start = time.perf_counter()
        may_draft = self._static_decoder is None or len(active) <= MAX_DRAFT_SLOTS
        drafts = self._draft([sequence for _, sequence in active], may_draft)
        chosen = self._verify(active, drafts) if any(drafts) or self._static_decoder is None else self._one_each(active)
        seconds = time.perf_counter() - start
        self.num_passes += 1
        accepted, first = [], 0
        for (slot, sequence), draft in zip(active, drafts, strict=True):
            # A token is the model's choice if all drafted tokens before it were.
            num_accepted = common_prefix(draft, chosen[first:])
            self.num_tokens += self._append(slot, sequence, chosen[first : first + num_accepted + 1], ended)
            accepted.append(num_accepted)
            first += 1 + len(draft)
        if self.drafts is not None and may_draft:
            self.drafts.observe(accepted, seconds)

    def _verify(self, active: list[tuple[int, Generated]], drafts: list[list[int]]) -> list[int]:
        """The choice after the last token of each sequence, and after each token of its draft."""
        assert self._cache is not None
        ids: list[int] = []
        segments = []
        for (slot, sequence), draft in zip(active, drafts, strict=True):
            segments.append(Segment(slot, len(sequence.ids) - 1, len(sequence.ids) + len(draft)))
            ids += [sequence.ids[-1], *draft]
        return self.decoder.forward(self._cache, ids, segments)

    def _one_each(self, active: list[tuple[int, Generated]]) -> list[int]:
        """The choice after the last token of each sequence, in a pass of a fixed shape."""
        assert self._static_decoder is not None
        last_tokens: list[tuple[int, int] | None] = [None] * len(self._slots)
        for slot, sequence in active:
            last_tokens[slot] = sequence.ids[-1], len(sequence.ids) - 1
        chosen = self._static_decoder.forward(last_tokens)
        return [chosen[slot] for slot, _ in active]

    def _draft(self, sequences: list[Generated], may_draft: bool) -> list[list[int]]:
        """Tokens that may follow each sequence, with the one after them within its limit."""
        if self.drafts is None or not may_draft:
            return [[] for _ in sequences]
        limits = [sequence.max_length - len(sequence.ids) - 1 for sequence in sequences]
        keys, ids = [sequence.key for sequence in sequences], [sequence.ids for sequence in sequences]
        return self.drafts.propose(keys, ids, limits)

    def _append(self, slot: int, sequence: Generated, tokens: list[int], ended: list[tuple[int, Completion]]) -> int:
        """Append tokens to the sequence of a slot, up to EOS; returns how many, EOS included."""
        if NOT_FINITE in tokens:
            num_tokens = len(sequence.ids) - sequence.prompt_length
            raise NonFiniteError(
                f"{self.locate(sequence.key)}: the logits after {num_tokens} tokens of its completion are infinite or "
                "not a number. If model.dtype is float16, set it to float32 or bfloat16."
            )
        stops = self.eos_token_id in tokens
        kept = tokens[: tokens.index(self.eos_token_id)] if stops else tokens
        sequence.ids.extend(kept)
        if kept and self.on_tokens is not None:
            self.on_tokens(sequence.key, kept)
        if stops or len(sequence.ids) == sequence.max_length:
            completion = Completion(sequence.ids[sequence.prompt_length :], "stop" if stops else "length")
            ended.append((sequence.key, completion))
            self._slots.release(slot)
        return len(kept) + stops


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
