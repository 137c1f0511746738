"""A record in any company: the same logits, bit for bit, in float32.

Each slot attends for itself, packed weights are added in one order for any number of rows from two on, and sums of int8
products are exact. Where a machine's library adds otherwise, these tests say so and compare closely instead.
"""

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers import new_module
from lit_phi2.generation.cache_attention import MIN_QUERIES
from lit_phi2.generation.drafts import Drafter
from lit_phi2.generation.engine import Engine
from lit_phi2.model.loading import frozen_linears
from lit_phi2.training.module import LitPhi2

Prompts = list[list[int]]
NUM_TOKENS = 12


def adds_in_one_order(module: LitPhi2) -> bool:
    """Whether a row's products are the same beside any number of other rows on this machine."""
    generator = torch.Generator().manual_seed(0)
    for layer in frozen_linears(module.fused_phi).values():
        rows, linear = torch.randn(128, layer.in_features, generator=generator), layer.rows(slice(None)).detach()
        packed = torch.ops.mkldnn._reorder_linear_weight(linear)
        product = partial(torch.ops.mkldnn._linear_pointwise, W=packed, B=None, attr="none", scalars=[], algorithm="")
        if not all(torch.equal(product(rows[:count])[:2], product(rows)[:2]) for count in range(2, 129)):
            return False
    return True


def multiplies_heads_in_one_order(module: LitPhi2) -> bool:
    """Whether attention over a slot gives a token the same bits beside any number of others of its slot."""
    generator = torch.Generator().manual_seed(0)
    width = module.fused_phi.model.layers[0].self_attn.head_dim
    query, keys = torch.randn(8, 9, width, generator=generator), torch.randn(8, 96, width, generator=generator)
    whole = torch.bmm(query, keys.transpose(1, 2))
    parts = [torch.bmm(query[:, :count].contiguous(), keys.transpose(1, 2)) for count in range(MIN_QUERIES, 10)]
    return all(torch.equal(part, whole[:, : part.shape[1]]) for part in parts)


@pytest.fixture(scope="module", params=[None, "int8"])
def module(phi_dir: Path, request: pytest.FixtureRequest) -> LitPhi2:
    return new_module(phi_dir, quantization=request.param)


class Foreseen(Drafter):
    """Drafts for one completion what it will be, with a wrong token at the end; 1, 2, ... 8 tokens in turn."""

    def __init__(self, key: int, prompt_length: int, completion: list[int]) -> None:
        super().__init__(None, eos_token_id=-1)
        self.key, self.prompt_length, self.completion = key, prompt_length, completion
        self.length = self.num_drafts = 0

    def propose(
        self, keys: Sequence[int], sequences: Sequence[Sequence[int]], limits: Sequence[int]
    ) -> list[list[int]]:
        self.length, drafts = 0, []
        for key, ids, limit in zip(keys, sequences, limits, strict=True):
            done, draft = len(ids) - self.prompt_length, []
            if key == self.key:
                draft = [*self.completion[done : done + self.num_drafts % 8], 1][:limit]
                self.length = len(draft)
                self.num_drafts += 1
            drafts.append(draft)
        return drafts

    def observe(self, num_accepted: Sequence[int], seconds: float) -> None:
        pass


def logits_of(
    module: LitPhi2,
    before: Prompts,
    prompt: list[int],
    after: Prompts,
    max_slots: int = 8,
    drafts: Foreseen | None = None,
) -> Tensor:
    """(NUM_TOKENS, V): of a prompt's completion, submitted between others."""
    engine = Engine(module.fused_phi, eos_token_id=-1, max_new_tokens=NUM_TOKENS, max_slots=max_slots, drafts=drafts)
    choose, weights = engine.decoder.choose, engine.decoder.weights
    rows: list[Tensor] = []  # of a pass, in the order in which its tokens are reported
    logits: list[Tensor] = []

    def keep(hidden: Tensor) -> list[int]:
        with torch.inference_mode():
            rows[:] = weights.head(weights.norm(hidden)).clone().unbind(0)
        return choose(hidden)

    def take(key: int, ids: list[int]) -> None:
        num_rows = 1
        if key == len(before):
            logits.extend(rows[: len(ids)])
            num_rows += drafts.length if drafts else 0
        del rows[:num_rows]

    engine.decoder.choose = keep  # type: ignore[method-assign]
    engine.on_tokens = take
    for key, each in enumerate([*before, prompt, *after]):
        engine.submit(key, each)
    while engine.waiting or engine.active:
        engine.step()
    return torch.stack(logits)


def random_prompts(seed: int, lengths: list[int]) -> Prompts:
    generator = random.Random(seed)
    return [generator.choices(range(1, 1000), k=length) for length in lengths]


@pytest.mark.parametrize("length", [1, 2, 30, 90])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([], [5]),
        ([3] * 7, []),
        ([150, 3, 80], [2, 200, 9, 1]),
        ([20] * 8, [20] * 8),
        ([40] * 19, [1]),
    ],
    ids=["slot 0", "slot 7", "long and short neighbours", "after a refill", "two refills"],
)
def test_logits_do_not_depend_on_company(module: LitPhi2, length: int, before: list[int], after: list[int]) -> None:
    (prompt,) = random_prompts(0, [length])
    alone = logits_of(module, [], prompt, [])
    beside = logits_of(module, random_prompts(1, before), prompt, random_prompts(2, after))
    assert alone.shape == beside.shape == (NUM_TOKENS, module.fused_phi.config.vocab_size)
    if adds_in_one_order(module):
        assert torch.equal(alone, beside)
    torch.testing.assert_close(alone, beside, rtol=0, atol=1e-5)


@pytest.mark.parametrize("before", [[], [20] * 6], ids=["alone", "in slot 6"])
@pytest.mark.parametrize("length", [2, 30, 90])
def test_drafted_tokens_have_the_logits_of_a_pass_of_their_own(module: LitPhi2, length: int, before: list[int]) -> None:
    (prompt,) = random_prompts(0, [length])
    alone = logits_of(module, [], prompt, [])
    drafts = Foreseen(len(before), length, alone.argmax(-1).tolist())
    drafted = logits_of(module, random_prompts(1, before), prompt, [], drafts=drafts)
    assert 2 < drafts.num_drafts < NUM_TOKENS - 1, "fewer passes than tokens"
    if adds_in_one_order(module) and multiplies_heads_in_one_order(module):
        assert torch.equal(alone, drafted)
    torch.testing.assert_close(alone, drafted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_shared", [15, 16, 17, 64, 99])
def test_a_shared_prefix_gives_the_logits_of_the_whole_prompt(module: LitPhi2, num_shared: int) -> None:
    """Alone nothing is shared. Beside others a prefix is copied from the same or an earlier pass."""
    (prompt,) = random_prompts(0, [100])
    siblings = [prompt[:num_shared] + tail for tail in random_prompts(3, [1, 30, 7])]
    alone = logits_of(module, [], prompt, [])
    for max_slots in (1, 2, 8):
        beside = logits_of(module, siblings, prompt, siblings, max_slots)
        torch.testing.assert_close(alone, beside, rtol=0, atol=1e-5)


def test_the_same_prompt_many_times_has_one_answer(module: LitPhi2) -> None:
    (prompt,) = random_prompts(0, [50])
    alone = logits_of(module, [], prompt, [])
    torch.testing.assert_close(alone, logits_of(module, [prompt] * 11, prompt, [prompt] * 3, 4), rtol=0, atol=1e-5)


def test_a_copied_adapter_gives_the_logits_of_the_added_one(module: LitPhi2) -> None:
    """Few expected tokens are decoded with the model's own layers."""
    (prompt,) = random_prompts(0, [50])
    merged = logits_of(module, [], prompt, [])
    engine = Engine(module.fused_phi, eos_token_id=-1, max_new_tokens=NUM_TOKENS, expected_prompts=1)
    assert module.quantization or engine.decoder.weights.min_rows == 1
    engine.submit(0, prompt)
    ended = []
    while engine.waiting or engine.active:
        ended += engine.step()
    best = merged.topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 1e-4, "a near tie would prove nothing"
    assert ended[0][1].ids == merged.argmax(-1).tolist()
