"""Generation: greedy answers to prompts, the same for samples during fit and for predict.

    . . p p p p  ->  a a E          prompts are padded on the left, so that all answers begin at the same place
    p p p p p p  ->  a a a a        an answer ends with the end token (stop) or at max_new_tokens (length)

The search itself is transformers' `generate`. The model leaves as it came: modes of its modules, cache flag, and no
random number drawn.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel


@dataclass(frozen=True, slots=True)
class Completion:
    """What the model said.

    Attributes:
        ids: new tokens without the prompt and without the end token.
        finish_reason: stop after the end token, length at max_new_tokens.
    """

    ids: list[int]
    finish_reason: Literal["stop", "length"]


@torch.no_grad()
def generate(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, eos_token_id: int, max_new_tokens: int
) -> list[Completion]:
    """Answer a batch of prompts greedily.

    Args:
        model: native or fused, with or without adapters in its layers.
        prompts: token ids, at least one each; lengths may differ.
        end_token: closes an answer.
        max_new_tokens: of an answer; the prompt does not count.

    Returns:
        One answer a prompt, in order.
    """
    longest = max(map(len, prompts))
    # Any id may stand at padding, since attention never sees it; the end token is one that every base has.
    input_ids = torch.full((len(prompts), longest), eos_token_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(prompts), longest), dtype=torch.int64)
    for line, prompt in enumerate(prompts):
        input_ids[line, longest - len(prompt) :] = torch.tensor(prompt)
        attention_mask[line, longest - len(prompt) :] = 1
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
        use_cache=True,
    )
    with _eval_mode(model):
        output = model.generate(  # type: ignore[operator]  # a mixin that mypy takes for a Tensor
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            generation_config=greedy,
        )
    return [_answer(line, eos_token_id) for line in output[:, longest:].tolist()]


def _answer(ids: list[int], eos_token_id: int) -> Completion:
    if eos_token_id in ids:
        return Completion(ids[: ids.index(eos_token_id)], "stop")
    return Completion(ids, "length")


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and afterwards back in the mode it had: frozen parts may differ from trained ones."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
