"""Parity: an export must say in its runtime what the running model says.

    running model, prompts     ->  Reference: greedy tokens, and the distribution at each of them
    runtime, the same prompts  ->  its own greedy tokens, and its distributions after the reference's tokens
    both                       ->  Parity: equal completions, largest KL divergence of a token  ->  kept or refused

A runtime follows its own tokens as long as they are the reference's; where they part, it starts again behind the
reference's token, so every token is compared after the same text.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lit_phi2.errors import InputError
from lit_phi2.generation.engine import generate
from lit_phi2.model.lora import PeftModel
from lit_phi2.model.phi2 import FusedPhiForCausalLM, packed_forward

CHECK_TOKENS = 32  # compared of each completion
MAX_PROMPTS = 64  # their distributions are kept in memory: 0.4 GB with Phi-2's vocabulary
_BATCH_TOKENS = 2048  # computed together; their keys and values take 0.7 GB in Phi-2

# Largest KL divergence of a token, in nats, by the coarsest dtype that the model passed through. Right exports measured
# at most 3e-6, 6e-3 (mlx-lm in float16), 6e-2 (mlx-lm in bfloat16) and 2e-3 on a trained and on random models;
# half the scale 0.4 to 3, another rotary width 1 to 16. Smaller faults are found by reading the tensors back.
KL_BOUNDS = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-1, "q8_0": 2e-1}
_COARSENESS = ("float32", "float16", "bfloat16", "q8_0")


@dataclass(frozen=True, slots=True)
class Reference:
    """What the running model says to prompts.

    Attributes:
        prompts: token ids.
        completions: its greedy tokens, EOS included where it came.
        logprobs: (tokens, V) for each completion, float32.
        adapter_effect: largest KL divergence of a token from the base without the adapter, in nats.
        dtype: its compute dtype.
        eos_token_id: ends a completion.
    """

    prompts: list[list[int]]
    completions: list[list[int]]
    logprobs: list[Tensor]
    adapter_effect: float
    dtype: str
    eos_token_id: int


@dataclass(frozen=True, slots=True)
class Step:
    """A greedy token of a runtime.

    Attributes:
        token: its id.
        logprobs: of the tokens in `ids`, or of the whole vocabulary; None if the runtime tells none.
        ids: None for the whole vocabulary.
    """

    token: int
    logprobs: Tensor | None
    ids: Tensor | None = None


class Runtime(Protocol):
    """A model that runs outside of lit_phi2."""

    name: str

    def greedy(self, prompt: Sequence[int], count: int) -> list[Step]:
        """Greedy tokens until EOS, which is one of them, or count."""
        ...


@dataclass(frozen=True, slots=True)
class Parity:
    """How far a runtime is from the running model.

    Attributes:
        runtime: its name and version.
        num_prompts, num_tokens: that were compared.
        equal_completions, equal_tokens: of those.
        max_kl, mean_kl: KL divergence of a token, in nats, from the running model's distribution.
        max_difference: largest difference of the logarithms of two probabilities.
        widest_gap: how much more likely, in nats, the running model finds its own token where the runtime has another.
        adapter_effect: of the reference.
    """

    runtime: str
    num_prompts: int
    num_tokens: int
    equal_completions: int
    equal_tokens: int
    max_kl: float
    mean_kl: float
    max_difference: float
    widest_gap: float
    adapter_effect: float

    def summary(self) -> str:
        """One line."""
        return (
            f"{self.runtime}: {self.equal_completions} of {self.num_prompts} greedy completions equal, "
            f"{self.equal_tokens} of {self.num_tokens} tokens; KL per token {self.max_kl:.1e} at most, "
            f"{self.mean_kl:.1e} on average (the adapter itself: {self.adapter_effect:.1e})"
        )


@torch.no_grad()
def run_reference(
    phi: PeftModel | FusedPhiForCausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    eos_token_id: int,
    max_tokens: int = CHECK_TOKENS,
) -> Reference:
    """Complete prompts with the running model, and keep its distribution at each token.

    Args:
        phi: the model with the adapter in its layers, or the base alone.
        prompts: token ids.
        eos_token_id: ends a completion.
        max_tokens: of a completion.
    """
    model: Any = phi.get_base_model() if isinstance(phi, PeftModel) else phi
    completions: list[list[int]] = []
    logprobs: list[Tensor] = []
    effect = 0.0
    for batch in _batches(prompts, max_tokens):
        answers = generate(model, batch, eos_token_id=eos_token_id, max_new_tokens=max_tokens, max_slots=len(batch))
        ids = [each.ids + ([eos_token_id] if each.finish_reason == "stop" else []) for each in answers]
        expected = _logprobs(model, batch, ids)
        if isinstance(phi, PeftModel):
            with phi.disable_adapter():
                base = _logprobs(model, batch, ids)
            rows = zip(torch.cat(expected), torch.cat(base), strict=True)
            effect = max(effect, *(divergence(row, other, None)[0] for row, other in rows))
        completions += ids
        logprobs += expected
    dtype = str(model.dtype).removeprefix("torch.")
    return Reference([list(prompt) for prompt in prompts], completions, logprobs, effect, dtype, eos_token_id)


def _batches(prompts: Sequence[Sequence[int]], max_tokens: int) -> Iterator[list[Sequence[int]]]:
    """Prompts that are computed together, padded to the longest: each forward reads the whole model."""
    batch: list[Sequence[int]] = []
    for prompt in prompts:
        if batch and (len(batch) + 1) * (max(map(len, [*batch, prompt])) + max_tokens) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(prompt)
    yield batch


def _logprobs(model: Any, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[Tensor]:
    """(tokens of the completion, V) of each, float32, on the CPU."""
    training = model.training
    texts = [[*prompt, *completion[:-1]] for prompt, completion in zip(prompts, completions, strict=True)]
    ids = torch.tensor([id for text in texts for id in text], device=model.device)[None]
    positions = torch.cat([torch.arange(len(text)) for text in texts]).to(model.device)[None]
    hidden = packed_forward(model.eval(), ids, positions)[0].split([len(text) for text in texts])
    model.train(training)
    ends = (part[len(prompt) - 1 :] for part, prompt in zip(hidden, prompts, strict=True))
    return [model.lm_head(end).float().log_softmax(-1).cpu() for end in ends]


def compare(reference: Reference, runtime: Runtime) -> Parity:
    """Run the reference's prompts in a runtime."""
    kls: list[float] = []
    equal_completions = equal_tokens = 0
    max_difference = widest_gap = 0.0
    for prompt, completion, logprobs in zip(reference.prompts, reference.completions, reference.logprobs, strict=True):
        done = 0
        while done < len(completion):
            steps = runtime.greedy([*prompt, *completion[:done]], len(completion) - done)
            equal_completions += done == 0 and [step.token for step in steps] == completion
            if not steps:
                raise InputError(f"{runtime.name}: gave no token.")
            for step in steps:
                expected, token = logprobs[done], completion[done]
                done += 1
                if step.logprobs is not None:
                    kl, difference = divergence(expected, step.logprobs, step.ids)
                    kls.append(kl)
                    max_difference = max(max_difference, difference)
                equal_tokens += step.token == token
                widest_gap = max(widest_gap, float(expected[token] - expected[step.token]))
                if step.token != token or step.logprobs is None:
                    break
    return Parity(
        runtime=runtime.name,
        num_prompts=len(reference.prompts),
        num_tokens=sum(map(len, reference.completions)),
        equal_completions=equal_completions,
        equal_tokens=equal_tokens,
        max_kl=max(kls, default=math.inf),
        mean_kl=sum(kls) / len(kls) if kls else math.inf,
        max_difference=max_difference,
        widest_gap=widest_gap,
        adapter_effect=reference.adapter_effect,
    )


def divergence(expected: Tensor, logprobs: Tensor, ids: Tensor | None) -> tuple[float, float]:
    """KL(expected || runtime) in nats, and the largest difference of two logarithms; infinite where one is NaN.

    Where a runtime gives the most likely tokens only, all others are one more event, which can make the divergence only
    smaller.

    Args:
        expected: (V,) logarithms of probabilities.
        logprobs: of the runtime, of the whole vocabulary or of `ids`.
        ids: tokens.
    """
    expected, logprobs = (expected if ids is None else expected[ids]).double(), logprobs.double()
    if not logprobs.isfinite().all() or not expected.isfinite().all():
        return math.inf, math.inf
    kl = float((expected.exp() * (expected - logprobs)).sum())
    if ids is not None:
        rest, runtime_rest = (1 - float(x.exp().sum()) for x in (expected, logprobs))
        if min(rest, runtime_rest) > 1e-4:  # below, what is missing to 1 is rounding
            kl += rest * math.log(rest / runtime_rest)
    return max(0.0, kl), float((expected - logprobs).abs().max())


def coarsest(*dtypes: str) -> str:
    """The dtype with the widest bound."""
    return max(dtypes, key=_COARSENESS.index)


def check_parity(parity: Parity, dtype: str) -> None:
    """Refuse an export that says something else than the running model.

    Args:
        parity: of the export.
        dtype: the coarsest that the model passed through.

    Raises:
        InputError: with the figures.
    """
    bound = KL_BOUNDS[dtype]
    # A token may differ where the two best are nearly as likely: a distribution within `bound` of another moves no
    # probability by more than sqrt(bound / 2) (Pinsker), and the two best by as much, in opposite directions.
    gap = 4 * math.sqrt(bound / 2)
    if parity.max_kl <= bound and parity.widest_gap <= gap:
        return
    raise InputError(
        f"export: refused, because the result does not say what the model says. {parity.summary()}; where a token "
        f"differs, the model finds its own up to {parity.widest_gap:.3f} nats more likely. The bounds for {dtype} are "
        f"a KL of {bound:.0e} and {gap:.3f} nats. Nothing was written. Choose a finer --dtype, or report this."
    )
