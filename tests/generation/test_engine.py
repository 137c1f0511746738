"""The engine against transformers.generate, which completes one prompt at a time (conftest.py)."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import new_module
from lit_phi2.errors import InputError
from lit_phi2.generation.engine import Completion, Engine, generate
from lit_phi2.model.lora import adapter_state_dict
from lit_phi2.training.module import LitPhi2

Prompts = list[list[int]]
Reference = Callable[[Sequence[int], int], tuple[Completion, int]]
NEW_TOKENS = 24


def complete(module: LitPhi2, prompts: Prompts, max_new_tokens: int = NEW_TOKENS, **settings: Any) -> list[Completion]:
    return generate(
        module.fused_phi, prompts, eos_token_id=module.eos_token_id, max_new_tokens=max_new_tokens, **settings
    )


def check_equal(completions: list[Completion], prompts: Prompts, reference: Reference, limits: list[int]) -> None:
    """Equal up to the first token where the reference's two best logits are nearly equal."""
    num_compared = 0
    for completion, prompt, limit in zip(completions, prompts, limits, strict=True):
        expected, num_decided = reference(prompt, limit)
        if num_decided > len(expected.ids) or (num_decided == len(expected.ids) and expected.finish_reason == "length"):
            assert completion == expected
        assert completion.ids[:num_decided] == expected.ids[:num_decided]
        num_compared += num_decided
    assert num_compared > 0.9 * sum(len(completion.ids) for completion in completions)


@pytest.mark.parametrize("max_slots", [1, 2, 5, None])
def test_completions_are_those_of_transformers(
    module: LitPhi2, reference: Reference, prompts: Prompts, max_slots: int | None
) -> None:
    completions = complete(module, prompts, max_slots=max_slots)
    check_equal(completions, prompts, reference, [NEW_TOKENS] * len(prompts))
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}


def test_limits_of_their_own_and_arrivals_change_no_answer(
    module: LitPhi2, reference: Reference, prompts: Prompts
) -> None:
    """Prompts arrive between passes, the longest last, so slots are refilled and the cache grows."""
    generator = random.Random(1)
    prompts = sorted(prompts, key=len)
    limits = [generator.randrange(1, 40) for _ in prompts]
    engine = Engine(module.fused_phi, eos_token_id=module.eos_token_id, max_new_tokens=99, max_slots=3)
    completions: dict[int, Completion] = {}
    for key, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        engine.submit(key, prompt, limit)
        for _ in range(generator.randrange(6)):
            completions.update(engine.step())
    while engine.waiting or engine.active:
        completions.update(engine.step())
    check_equal([completions[key] for key in range(len(prompts))], prompts, reference, limits)


def test_tokens_are_reported_as_they_are_chosen(module: LitPhi2, prompts: Prompts) -> None:
    engine = Engine(module.fused_phi, eos_token_id=module.eos_token_id, max_new_tokens=NEW_TOKENS, max_slots=4)
    reported: dict[int, list[int]] = {key: [] for key in range(len(prompts))}
    engine.on_tokens = lambda key, ids: reported[key].extend(ids)
    for key, prompt in enumerate(prompts):
        engine.submit(key, prompt)
    completions: dict[int, Completion] = {}
    while engine.waiting or engine.active:
        assert engine.active <= 4
        completions.update(engine.step())
        for key, completion in completions.items():
            assert reported[key] == completion.ids
    assert len(completions) == len(prompts)


def test_without_its_adapter_a_model_answers_as_its_base(module: LitPhi2, phi_dir: Path, prompts: Prompts) -> None:
    """Reference: a model whose B is zero."""
    base = new_module(phi_dir)
    with torch.no_grad():
        base.fused_phi.lm_head.bias.copy_(module.fused_phi.lm_head.bias)
        for name, parameter in base.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    expected = complete(base, prompts)
    assert module.phi is not None
    with module.phi.disable_adapter():
        disabled = complete(module, prompts)
    assert disabled == complete(module, prompts, use_adapter=False) == expected
    assert complete(module, prompts) != expected


def test_a_model_is_left_as_it_was(module: LitPhi2, prompts: Prompts) -> None:
    module.train()
    module.fused_phi.model.layers[0].eval()  # mixed modes
    modes = {name: layer.training for name, layer in module.named_modules()}
    weights = {name: weight.clone() for name, weight in module.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    complete(module, prompts)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: layer.training for name, layer in module.named_modules()} == modes
    assert all(torch.equal(weight, weights[name]) for name, weight in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_an_engine_answers_with_the_weights_of_its_start(phi_dir: Path, prompts: Prompts) -> None:
    """A new engine has those of now: samples after a step of training are of that step."""
    module = new_module(phi_dir)
    before = complete(module, prompts)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-3)
    assert module.phi is not None
    assert any(weight.any() for weight in adapter_state_dict(module.phi).values())
    assert complete(module, prompts) != before


def test_no_prompts_have_no_completions(module: LitPhi2) -> None:
    assert complete(module, []) == []


def test_a_prompt_longer_than_the_positions_is_refused(module: LitPhi2) -> None:
    positions = module.fused_phi.config.max_position_embeddings
    engine = Engine(module.fused_phi, eos_token_id=module.eos_token_id, max_new_tokens=10)
    engine.submit(0, [1] * (positions - 10))
    with pytest.raises(InputError, match=rf"{positions - 9} tokens and its completion up to 10; .* {positions} pos"):
        engine.submit(1, [1] * (positions - 9))
    assert engine.waiting == 1


def test_the_last_position_is_used(module: LitPhi2, reference: Reference) -> None:
    prompt = random.Random(2).choices(range(1, 1000), k=module.fused_phi.config.max_position_embeddings - 3)
    check_equal(complete(module, [prompt], 3), [prompt], reference, [3])


def test_bfloat16_completions_begin_as_in_float32(phi_dir: Path, module: LitPhi2, prompts: Prompts) -> None:
    """Rounding to 8 bits changes a choice now and then, and everything after it; a wrong pass changes the first."""
    rounded = new_module(phi_dir, dtype="bfloat16")
    with torch.no_grad():
        rounded.fused_phi.lm_head.bias.copy_(module.fused_phi.lm_head.bias)
    pairs = list(zip(complete(module, prompts, 1), complete(rounded, prompts, 1), strict=True))
    assert sum(one == other for one, other in pairs) > 0.8 * len(pairs)
