"""Engine: greedy completions of prompts, the same for samples during fit, for test and for predict.

    . . p p p p  ->  c c E          prompts are padded on the left, so that all completions begin in the same column
    p p p p p p  ->  c c c c        a completion ends with EOS (stop) or at max_new_tokens (length)

The search is transformers' `generate` on our block forward. It leaves the model as it was: the modes of its modules,
its cache setting, and the random number generator.
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
    """What the model generated for a prompt.

    Attributes:
        ids: new tokens, without the prompt and without EOS.
        finish_reason: stop after EOS, length at max_new_tokens.
    """

    ids: list[int]
    finish_reason: Literal["stop", "length"]


@torch.no_grad()
def generate(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, eos_token_id: int, max_new_tokens: int
) -> list[Completion]:
    """Complete a batch of prompts greedily.

    Args:
        model: transformers' Phi or the fused one, with or without adapters in its layers.
        prompts: token ids, at least one each; lengths may differ.
        eos_token_id: ends a completion.
        max_new_tokens: upper bound on the tokens of a completion; the prompt does not count.

    Returns:
        One completion per prompt, in order.
    """
    max_length = max(map(len, prompts))
    # Any id may be at padding, because attention never sees it; every base has an EOS token.
    input_ids = torch.full((len(prompts), max_length), eos_token_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(prompts), max_length), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        input_ids[row, max_length - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, max_length - len(prompt) :] = 1
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
        use_cache=True,
    )
    with _eval_mode(model):
        output = model.generate(  # type: ignore[operator]  # a mixin, which mypy takes for a Tensor
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            generation_config=greedy,
        )
    return [_completion(ids, eos_token_id) for ids in output[:, max_length:].tolist()]


def _completion(ids: list[int], eos_token_id: int) -> Completion:
    if eos_token_id in ids:
        return Completion(ids[: ids.index(eos_token_id)], "stop")
    return Completion(ids, "length")


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode, and restore the mode of each afterwards: they may differ."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
