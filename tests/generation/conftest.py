"""A random adapter on the two-layer Phi, and transformers' own Phi with the same adapter merged by PEFT."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import GenerationConfig, PhiForCausalLM

from helpers import new_module
from lit_phi2.adapters.peft_format import save_adapter
from lit_phi2.generation.engine import Completion
from lit_phi2.training.module import LitPhi2

NEAR_TIE = 1e-4  # two best logits that are closer may change places with the order of summation
Reference = Callable[[Sequence[int], int], tuple[Completion, int]]


@pytest.fixture(scope="module")
def module(phi_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> LitPhi2:
    """In float32; EOS is likely enough to end some of its completions."""
    module = new_module(phi_dir)
    with torch.no_grad():
        module.fused_phi.lm_head.bias[module.eos_token_id] = 1.5
    return module


@pytest.fixture(scope="module")
def reference(phi_dir: Path, module: LitPhi2, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Completes one prompt with transformers.generate; also how many of its tokens, EOS included, are no near ties."""
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(module.trained_adapter(), folder)
    native = PhiForCausalLM.from_pretrained(phi_dir, dtype=torch.float32)
    merged = PeftModel.from_pretrained(native, str(folder)).merge_and_unload().eval()
    with torch.no_grad():
        merged.lm_head.bias.copy_(module.fused_phi.lm_head.bias)

    def complete(prompt: Sequence[int], max_new_tokens: int) -> tuple[Completion, int]:
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=module.eos_token_id,
            pad_token_id=module.eos_token_id,
            output_logits=True,
            return_dict_in_generate=True,
        )
        ids = torch.tensor([list(prompt)])
        with torch.no_grad():
            output = merged.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        tokens = output.sequences[0, len(prompt) :].tolist()
        gaps = [float(best[0] - best[1]) for best in (logits[0].topk(2).values for logits in output.logits)]
        num_decided = next((index for index, gap in enumerate(gaps) if gap <= NEAR_TIE), len(gaps))
        if tokens[-1] == module.eos_token_id:
            return Completion(tokens[:-1], "stop"), num_decided
        return Completion(tokens, "length"), num_decided

    return complete


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """24 random prompts of 1 to 120 tokens; some begin alike."""
    generator = random.Random(0)
    prefix = [generator.randrange(1, 1000) for _ in range(40)]
    prompts = []
    for number in range(24):
        length = generator.choice([1, 2, 3, 7, 20, 60, 120])
        own = [generator.randrange(1, 1000) for _ in range(length)]
        prompts.append(prefix[: 10 * (number % 5)] + own if number % 3 == 0 else own)
    return prompts
