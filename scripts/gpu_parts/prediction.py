"""Prediction: LitPhi2.generate against transformers.generate with the adapter merged, on the same batches of prompts.

    packaged test records -> batches as predict makes them -> ours, transformers, ours, ... -> new tokens a second

Merging rounds the weights, so in bfloat16 some completions differ; the number of equal ones is reported, not judged.
"""

from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig

from gpu_parts.machine import compute_dtype
from gpu_parts.settings import Settings
from lit_phi2.adapters.peft_format import save_adapter
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.model.lora import trainable_parameters
from lit_phi2.training.module import LitPhi2
from peers.task import LORA_ALPHA, LORA_R, SEED
from timers import now

Generate = Callable[[list[list[int]]], list[list[int]]]  # prompts -> new tokens, without the EOS token


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    torch.manual_seed(SEED)
    module = load_module(settings)
    engines = {"lit_phi2": ours(module), "transformers": merged_transformers(module, settings)}
    batches = prompt_batches(settings)
    completions = {name: generate_all(generate, batches) for name, generate in engines.items()}  # untimed
    pairs = list(zip(*completions.values(), strict=True))
    yield {
        "prompts": len(pairs),
        "batches": len(batches),
        "equal_completions": sum(a == b for a, b in pairs),
        "equal_tokens": sum(common_prefix(a, b) for a, b in pairs) / max(1, sum(len(a) for a, _ in pairs)),
    }
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(settings.rounds):
        for name, generate in engines.items():
            began = now(settings.device)
            tokens = sum(len(ids) for ids in generate_all(generate, batches))
            speeds[name].append(tokens / (now(settings.device) - began))
        speedup = median(a / b for a, b in zip(*speeds.values(), strict=True))
        yield {
            "new_tokens_per_second": speeds,
            "speedup": speedup,
            "summary": f"{median(speeds['lit_phi2']):,.0f} new tokens/s, {speedup:.2f} times transformers.generate",
        }


def load_module(settings: Settings) -> LitPhi2:
    """The base with an adapter that changes what it says; a new one has B = 0."""
    module = LitPhi2(
        base=str(settings.base_dir),
        lora_r=LORA_R,
        lora_alpha=LORA_ALPHA,
        dtype=compute_dtype(settings),  # without a Trainer the module would choose the CPU's
        max_new_tokens=settings.max_new_tokens,
    )
    module.configure_model()
    assert module.phi is not None
    with torch.no_grad():
        for name, parameter in trainable_parameters(module.phi).items():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    return module.to(settings.device)


def prompt_batches(settings: Settings) -> list[list[list[int]]]:
    data = ClaimsDataModule(
        predict_files=f"claims:test[:{settings.num_prompts}]",
        base=str(settings.base_dir),
        max_new_tokens=settings.max_new_tokens,
    )
    data.setup("predict")
    return [batch.prompts for batch in data.prompt_batches("predict")]


def ours(module: LitPhi2) -> Generate:
    return lambda prompts: [completion.ids for completion in module.generate(prompts)]


def merged_transformers(module: LitPhi2, settings: Settings) -> Generate:
    """transformers' own Phi with the same adapter merged into its weights."""
    adapter_dir = settings.work_path / "adapter"
    save_adapter(module.trained_adapter(), adapter_dir)
    dtype = getattr(torch, compute_dtype(settings))
    phi: Any = AutoModelForCausalLM.from_pretrained(settings.base_dir, dtype=dtype, local_files_only=True)
    model = PeftModel.from_pretrained(phi.to(settings.device), str(adapter_dir)).merge_and_unload().eval()
    eos_token_id = module.eos_token_id
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
    )

    @torch.no_grad()
    def generate(prompts: list[list[int]]) -> list[list[int]]:
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        input_ids = torch.tensor([[eos_token_id] * n + prompt for n, prompt in zip(padding, prompts, strict=True)])
        attention_mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding])
        output = model.generate(
            input_ids=input_ids.to(settings.device),
            attention_mask=attention_mask.to(settings.device),
            generation_config=greedy,
        )
        rows = output[:, longest:].tolist()
        return [row[: row.index(eos_token_id)] if eos_token_id in row else row for row in rows]

    return generate


def generate_all(generate: Generate, batches: list[list[list[int]]]) -> list[list[int]]:
    return [ids for batch in batches for ids in generate(batch)]


def common_prefix(a: list[int], b: list[int]) -> int:
    """Tokens that two completions share from the first.

    >>> common_prefix([1, 2, 3], [1, 2, 4])
    2
    """
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
