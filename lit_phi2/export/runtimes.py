"""Runtimes: the programs that exports are for, as parity.py runs them.

peft          transformers' Phi and PEFT        gguf, gguf-merged   llama.cpp, by xllamacpp
merged        transformers                      mlx                 mlx-lm
"""

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from lit_phi2.export.llama_cpp import LlamaCppProcess
from lit_phi2.export.parity import Reference, Runtime, Step
from lit_phi2.model.lora import PeftModel


def is_installed(package: str) -> bool:
    """Whether a package can be imported here."""
    return importlib.util.find_spec(package) is not None


class TransformersRuntime:
    """A model of transformers, plain or in PEFT."""

    def __init__(self, model: Any, name: str, eos_token_id: int) -> None:
        self.model, self.name, self.eos_token_id = model.eval(), name, eos_token_id

    def greedy(self, prompt: Sequence[int], count: int) -> list[Step]:
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=count,
            eos_token_id=self.eos_token_id,
            pad_token_id=self.eos_token_id,
            output_logits=True,
            return_dict_in_generate=True,
        )
        with torch.no_grad():
            output = self.model.generate(
                input_ids=torch.tensor([list(prompt)]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                generation_config=config,
            )
        tokens = output.sequences[0, len(prompt) :].tolist()
        return [
            Step(token, logits[0].float().log_softmax(-1)) for token, logits in zip(tokens, output.logits, strict=True)
        ]


class LlamaCppRuntime:
    """A model in llama.cpp."""

    def __init__(self, process: LlamaCppProcess) -> None:
        self.process, self.name = process, f"llama.cpp (xllamacpp {metadata.version('xllamacpp')})"

    def greedy(self, prompt: Sequence[int], count: int) -> list[Step]:
        answer = self.process.greedy(list(prompt), count)
        steps = [Step(token, None) for token in answer["tokens"]]
        reported = zip(answer["reported"], answer["ids"], answer["logprobs"], strict=True)
        for index, (token, ids, logprobs) in enumerate(reported):
            if token != steps[index].token:  # llama.cpp left one out, so the rest belong to later tokens
                break
            values = [float("nan") if x is None else x for x in logprobs]  # llama.cpp writes null for NaN
            steps[index] = Step(token, torch.tensor(values), torch.tensor(ids))
        return steps


class MlxRuntime:
    """A model in mlx-lm."""

    def __init__(self, model: Any, eos_token_id: int) -> None:
        self.model, self.eos_token_id = model, eos_token_id
        self.name = f"mlx-lm {metadata.version('mlx-lm')}"

    def greedy(self, prompt: Sequence[int], count: int) -> list[Step]:
        import mlx.core as mx
        import numpy as np
        from mlx_lm.generate import generate_step

        steps = []
        for token, logprobs in generate_step(mx.array(list(prompt)), self.model, max_tokens=count):
            steps.append(Step(int(token), torch.from_numpy(np.array(logprobs.astype(mx.float32)))))
            if token == self.eos_token_id:
                break
        return steps


@contextlib.contextmanager
def peft_runtime(base_folder: Path, adapter_folder: Path, reference: Reference) -> Iterator[Runtime]:
    """The exported adapter in plain PEFT, on transformers' own Phi in the running model's dtype."""
    model = AutoModelForCausalLM.from_pretrained(
        base_folder, dtype=getattr(torch, reference.dtype), local_files_only=True
    )
    peft = PeftModel.from_pretrained(model, str(adapter_folder))
    name = f"peft {metadata.version('peft')}, transformers {metadata.version('transformers')}"
    yield TransformersRuntime(peft, name, reference.eos_token_id)


@contextlib.contextmanager
def transformers_runtime(folder: Path, dtype: str, reference: Reference) -> Iterator[Runtime]:
    """The merged folder in transformers; float16 in float32, because Phi-2's attention overflows float16 there."""
    # huggingface/transformers#28673
    compute_dtype = torch.float32 if dtype == "float16" else getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=compute_dtype, local_files_only=True)
    name = f"transformers {metadata.version('transformers')} in {str(compute_dtype).removeprefix('torch.')}"
    yield TransformersRuntime(model, name, reference.eos_token_id)


@contextlib.contextmanager
def llama_cpp_runtime(model: Path, adapter: Path | None, reference: Reference) -> Iterator[Runtime]:
    """A GGUF file in llama.cpp, with its defaults: keys and values of the cache in float16."""
    pairs = zip(reference.prompts, reference.completions, strict=True)
    context = max(len(prompt) + len(completion) for prompt, completion in pairs) + 1
    with LlamaCppProcess(model, adapter, context=context, num_threads=torch.get_num_threads()) as process:
        yield LlamaCppRuntime(process)


@contextlib.contextmanager
def mlx_runtime(base_folder: Path, adapter_folder: Path, reference: Reference) -> Iterator[Runtime]:
    """The exported adapter in mlx-lm."""
    from mlx_lm import load

    model = load(str(base_folder), adapter_path=str(adapter_folder))[0]
    yield MlxRuntime(model, reference.eos_token_id)
