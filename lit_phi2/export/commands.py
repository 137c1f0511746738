"""Commands: the line that loads an export in its runtime, ready to paste into a shell."""

import json
import shlex

from lit_phi2.data.prompts import format_prompt
from lit_phi2.utils.paths import GGUF_ADAPTER_FILE

INSTRUCTION = "Why was this claim denied?"
GGUF_NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "q8_0": "q8_0"}  # as llama.cpp calls them
CONVERTED_BASE = "phi-2-converted"
_GGUF_BASE_DIR = "base-gguf"


def gguf_model_file(dtype: str) -> str:
    """File of a merged model."""
    return f"model-{GGUF_NAMES[dtype]}.gguf"


GGUF_BASE = f"{_GGUF_BASE_DIR}/{gguf_model_file('float16')}"


def load_command(format: str, dtype: str, base: str, folder: str, *, has_template: bool = False) -> str:
    """The command that loads an export.

    Args:
        format: peft, merged, gguf, gguf-merged or mlx.
        dtype: of the export.
        base: hub id or folder of the base.
        folder: of the export.
        has_template: whether the base that mlx-lm loads has our chat template.
    """
    if format == "peft":
        code = (
            "from transformers import AutoModelForCausalLM as M; from peft import PeftModel; "
            f'print(PeftModel.from_pretrained(M.from_pretrained({_quote(base)}, dtype="bfloat16"), {_quote(folder)}))'
        )
        return f"python -c {shlex.quote(code)}"
    if format == "merged":
        messages = _quote([{"role": "user", "content": INSTRUCTION}])
        code = (
            f'from transformers import pipeline; print(pipeline("text-generation", {_quote(folder)})({messages}, '
            'max_new_tokens=256)[0]["generated_text"][-1]["content"])'
        )
        return f"python -c {shlex.quote(code)}"
    if format == "gguf":
        return f"llama-server -m {GGUF_BASE} --lora {shlex.quote(f'{folder}/{GGUF_ADAPTER_FILE}')}"
    if format == "gguf-merged":
        return f"llama-server -m {shlex.quote(f'{folder}/{gguf_model_file(dtype)}')}"
    arguments = ["--model", base, "--adapter-path", folder]
    if has_template:
        arguments += ["--prompt", INSTRUCTION]
    else:  # mlx-lm reads the two characters \n as a line feed
        arguments += ["--ignore-chat-template", "--prompt", format_prompt(INSTRUCTION).replace("\n", "\\n")]
    return f"python -m mlx_lm generate {shlex.join(arguments)}"


def _quote(value: object) -> str:
    """A Python literal with double quotes, so that a shell takes the whole code in single ones."""
    return json.dumps(value)


def base_gguf_help(base: str, place: str) -> str:
    """How to get the base as GGUF that a GGUF adapter needs.

    Args:
        base: hub id or folder.
        place: where the runtime looks for it.
    """
    moved = "" if place == GGUF_BASE else f" ({GGUF_BASE} is then {place})"
    return (
        f"An adapter needs its base as GGUF, with attn_q, attn_k and attn_v apart{moved}:\n"
        f"    {_export_base(base)} --format gguf-merged --output_dir {_GGUF_BASE_DIR}\n"
        "An older file of Phi-2 may have one attn_qkv instead; llama.cpp crashes when it loads this adapter on that."
    )


def converted_base_help(base: str, dtype: str) -> str:
    """How to get a base of Phi-2's original code in the form that the load command needs."""
    return (
        "The base has the names of Phi-2's original code, which this runtime does not read. First convert it:\n"
        f"    {_export_base(base)} --format merged --dtype {dtype} --output_dir {CONVERTED_BASE}"
    )


def _export_base(base: str) -> str:
    """The command that exports a base alone; packaged prompts that are too long for it are left out of its check."""
    return f"python -m lit_phi2 export --model.base {shlex.quote(base)} --data.on_bad_record skip"


def quantize_help(file: str) -> str:
    """How to make the smaller kinds of a merged model."""
    return f"a smaller one: llama-quantize {shlex.quote(file)} model-q4_k_m.gguf Q4_K_M"
