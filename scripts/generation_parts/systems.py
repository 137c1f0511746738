"""Systems: who completes prompts, all with one interface, each in a process of its own.

SystemSettings -> load -> complete(prompts, limits) -> token ids without EOS, in order

ours           lit_phi2's engine
transformers   its own Phi, adapter merged, generate on batches padded on the left, sorted by length
former         generate of transformers on lit_phi2's model, adapter not merged: predict as it was before the engine
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria
from transformers.utils import logging

from generation_parts.texts import read_examples
from lit_phi2.adapters.checkpoint import read_adapter
from lit_phi2.generation.drafts import Drafter
from lit_phi2.generation.engine import Engine
from lit_phi2.generation.kv_cache import round_up
from lit_phi2.generation.ngrams import build_index
from lit_phi2.model.linear import FrozenLinear
from lit_phi2.pretrained import resolve_base_model
from lit_phi2.training.module import LitPhi2

FORMER_BATCH = 32  # prompts, and the tokens of all of them with their completions, of a batch of the former predict
FORMER_BATCH_TOKENS = 8192
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
NO_EOS = -1  # no token has it: a completion of random weights ends at its limit alone


@dataclass(frozen=True, slots=True)
class SystemSettings:
    """A system on a base.

    Attributes:
        name: ours, transformers or former.
        base, adapter: as model.base and model.adapter.
        dtype: auto, float32 or bfloat16.
        quantization: of ours; int8 or None.
        batch_size: of transformers.
        ends: whether EOS ends a completion.
        learned: of ours; records whose responses drafts are looked up in, None for no drafts.
        threads: of torch; None for its default.
        clock: wall, or cpu for the processor time of the process: of one thread, on a machine that has other work.
    """

    name: str
    base: str
    adapter: str
    dtype: str = "auto"
    quantization: str | None = None
    batch_size: int = 8
    ends: bool = True
    learned: str | None = None
    threads: int | None = None
    clock: str = "wall"


class System:
    """A loaded system, whose methods a Worker calls by name."""

    def __init__(self, settings: SystemSettings) -> None:
        if settings.threads:
            torch.set_num_threads(settings.threads)
        logging.disable_progress_bar()
        self.settings = settings
        self.now = CLOCKS[settings.clock]

    def prepare(self, limits: list[int]) -> None:
        """Copy weights for the next `complete`, where a system does that; others have merged the adapter in loading."""


class Ours(System):
    """The engine, with the adapter in the layers of the model."""

    def __init__(self, settings: SystemSettings) -> None:
        super().__init__(settings)
        self.module = load_module(settings)
        self.eos_token_id = self.module.eos_token_id if settings.ends else NO_EOS
        self.prepared: Engine | None = None
        learned = settings.learned
        self.index = None if learned is None else build_index(read_examples(settings.base, learned, None))

    def engine(self, limits: Sequence[int], **options: Any) -> Engine:
        return Engine(
            self.module.fused_phi,
            eos_token_id=self.eos_token_id,
            max_new_tokens=max(limits),
            expected_prompts=len(limits),
            **options,
        )

    def prepare(self, limits: list[int]) -> None:
        """Copy weights for the next `complete`."""
        drafts = Drafter(self.index, eos_token_id=self.eos_token_id) if self.index is not None else None
        self.prepared = self.engine(limits, drafts=drafts)

    def complete(self, prompts: list[list[int]], limits: list[int]) -> list[list[int]]:
        """New tokens of each prompt, at most its limit, in order."""
        if self.prepared is None:
            self.prepare(limits)
        engine, self.prepared = self.prepared, None
        assert engine is not None
        for key in sorted(range(len(prompts)), key=lambda key: len(prompts[key]), reverse=True):
            engine.submit(key, prompts[key], limits[key])
        completions: dict[int, list[int]] = {}
        while engine.waiting or engine.active:
            completions.update((key, completion.ids) for key, completion in engine.step())
        return [completions[key] for key in range(len(prompts))]

    def decode(self, prompt: list[int], count: int) -> dict[str, Any]:
        """Times of one completion: the first token's, and the later passes'; bytes that a pass reads."""
        engine = self.engine([count], max_slots=1)
        began = self.now()
        first: list[float] = []
        engine.on_tokens = lambda key, ids: first.append(self.now() - began)
        engine.submit(0, prompt)
        seconds = []
        while engine.waiting or engine.active:
            start = self.now()
            engine.step()
            seconds.append(self.now() - start)
        dtype = engine.decoder.weights.dtype
        return {
            "first_token_seconds": first[0],
            "pass_seconds": seconds[1:],
            "weight_bytes": self._linear_weights() * (1 if self.settings.quantization else dtype.itemsize),
            "cache_bytes": engine.decoder.cache_shape.num_bytes(1, round_up(len(prompt) + count)),
            "dtype": str(dtype).removeprefix("torch."),
        }

    def _linear_weights(self) -> int:
        model = self.module.fused_phi
        return sum(module.weight.numel() for module in model.modules() if isinstance(module, FrozenLinear))

    def profile(self, prompts: list[list[int]], passes: int) -> str:
        """Operators of decode passes, by their own time."""
        engine = self.engine([4 * passes] * len(prompts))
        for key, prompt in enumerate(prompts):
            engine.submit(key, prompt)
        engine.step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for _ in range(passes):
                engine.step()
        table: str = profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=45)
        return table

    def draft(self, questions: list[Any], *, examples: list[Any] | None, limit: int, forced: bool) -> dict[str, Any]:
        """Complete prompts one at a time.

        Args:
            questions: of `texts.py`.
            examples: whose responses are indexed; None for no drafts.
            limit: tokens of a completion.
            forced: the model chooses the reference, whatever it computes.
        """
        drafts = None
        if examples is not None:
            drafts = Drafter(build_index(examples), eos_token_id=self.eos_token_id)
        engine = Engine(
            self.module.fused_phi,
            eos_token_id=self.eos_token_id,
            max_new_tokens=limit,
            max_slots=1,
            drafts=drafts,
        )
        choose = engine.decoder.forward
        began, ids = self.now(), []
        for key, question in enumerate(questions):
            if forced:
                engine.decoder.forward = partial(_forced, choose, question.prompt + question.reference)  # type: ignore[method-assign]
            engine.submit(key, question.prompt, min(limit, len(question.reference)) if forced else limit)
            while engine.waiting or engine.active:
                ids += [completion.ids for _, completion in engine.step()]
        return {
            "seconds": self.now() - began,
            "passes": engine.num_passes,
            "tokens": engine.num_tokens,
            "ids": ids,
        }


def _forced(choose: Any, text: list[int], cache: Any, ids: Any, segments: Any, wanted: Any = None) -> list[int]:
    """A pass that computes its choices, and then takes the text's next tokens instead; of one slot."""
    choose(cache, ids, segments, wanted)
    (segment,) = segments
    places = [segment.end - 1] if wanted is not None else range(segment.start, segment.end)
    return [text[min(place + 1, len(text) - 1)] for place in places]


class Transformers(System):
    """generate, on batches of one size."""

    def __init__(self, settings: SystemSettings) -> None:
        super().__init__(settings)
        dtype, folder = getattr(torch, settings.dtype), resolve_base_model(settings.base).folder
        phi: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        self.model: Any = PeftModel.from_pretrained(phi, settings.adapter).merge_and_unload().eval()
        self.eos_token_id = int(phi.config.eos_token_id) if settings.ends else None
        self.batch_size = settings.batch_size

    def complete(self, prompts: list[list[int]], limits: list[int]) -> list[list[int]]:
        order = sorted(range(len(prompts)), key=lambda key: len(prompts[key]), reverse=True)
        size = self.batch_size
        batches = (order[start : start + size] for start in range(0, len(order), size))
        return complete_batches(self.model, prompts, limits, batches, self.eos_token_id)

    def measure(self, batch_size: int, prompts: list[list[int]], limits: list[int]) -> float:
        """New tokens a second in batches of another size."""
        self.batch_size = batch_size
        self.complete(prompts[:2], [min(limit, 4) for limit in limits[:2]])
        began = self.now()
        tokens = sum(map(len, self.complete(prompts, limits)))
        return tokens / (self.now() - began)


class Former(System):
    """What predict was before the engine: the fused model in the dtype that predict chooses, shortest prompts first."""

    def __init__(self, settings: SystemSettings) -> None:
        super().__init__(settings)
        module = load_module(settings)
        self.model: Any = module.fused_phi.eval()
        self.eos_token_id = module.eos_token_id if settings.ends else None

    def complete(self, prompts: list[list[int]], limits: list[int]) -> list[list[int]]:
        lengths = [len(prompt) for prompt in prompts]
        return complete_batches(self.model, prompts, limits, former_batches(lengths, max(limits)), self.eos_token_id)


def former_batches(lengths: Sequence[int], max_new_tokens: int) -> Iterator[list[int]]:
    """Shortest first, bounded by prompts and by tokens.

    >>> list(former_batches([3, 1, 2], 8000))
    [[1, 2], [0]]
    """
    batch: list[int] = []
    for key in sorted(range(len(lengths)), key=lambda key: lengths[key]):
        num_tokens = (len(batch) + 1) * (lengths[key] + max_new_tokens)
        if batch and (len(batch) == FORMER_BATCH or num_tokens > FORMER_BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(key)
    if batch:
        yield batch


class _Limits(StoppingCriteria):
    """Ends each row of a batch at its own limit."""

    def __init__(self, length: int, limits: list[int]) -> None:
        self.ends = length + torch.tensor(limits)

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return self.ends <= input_ids.shape[1]


@torch.no_grad()
def complete_batches(
    model: Any, prompts: list[list[int]], limits: list[int], batches: Any, eos_token_id: int | None
) -> list[list[int]]:
    """transformers' generate, greedily, on batches of prompts padded on the left."""
    completions: dict[int, list[int]] = {}
    for batch in batches:
        longest = max(len(prompts[key]) for key in batch)
        input_ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for row, key in enumerate(batch):
            input_ids[row, longest - len(prompts[key]) :] = torch.tensor(prompts[key])
            attention_mask[row, longest - len(prompts[key]) :] = 1
        own = [limits[key] for key in batch]
        config = GenerationConfig(
            do_sample=False, max_new_tokens=max(own), eos_token_id=eos_token_id, pad_token_id=0, use_cache=True
        )
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            generation_config=config,
            stopping_criteria=[_Limits(longest, own)],
        )
        for key, ids in zip(batch, output[:, longest:].tolist(), strict=True):
            ids = ids[: limits[key]]
            completions[key] = ids[: ids.index(eos_token_id)] if eos_token_id in ids else ids
    return [completions[key] for key in range(len(prompts))]


def load_module(settings: SystemSettings) -> LitPhi2:
    """The base with the adapter, whose rank and scale are those of its folder."""
    lora = read_adapter(Path(settings.adapter)).settings
    module = LitPhi2(
        base=settings.base,
        adapter=settings.adapter,
        dtype=settings.dtype,
        quantization=settings.quantization,
        lora_r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        target_modules=list(lora.target_modules),
    )
    module.configure_model()
    return module


class Bandwidth(System):
    """The rate at which this machine reads memory, in place of a system."""

    def __init__(self, settings: SystemSettings) -> None:
        super().__init__(settings)
        self.buffer = torch.ones(settings.batch_size * 2**8, 2**10)  # batch_size MiB, larger than the caches

    def read(self) -> float:
        """Bytes a second of a product with a vector, which reads faster than a sum does."""
        began = self.now()
        self.buffer @ self.buffer[0]
        return self.buffer.nbytes / (self.now() - began)


SYSTEMS: dict[str, Callable[[SystemSettings], System]] = {
    "ours": Ours,
    "transformers": Transformers,
    "former": Former,
    "bandwidth": Bandwidth,
}
