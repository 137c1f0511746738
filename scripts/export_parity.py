"""Every export of a small random Phi with Phi-2's own tokenizer, in its runtime, against the running model: a table.

    python scripts/export_parity.py --tokenizer FOLDER

FOLDER holds Phi-2's tokenizer.json and tokenizer_config.json, which the repository has not: the tests use a vocabulary
that is laid out alike. Needs the extra 'runtimes'. The base has two layers, 256 wide, a vocabulary of 51,200 rows, and
half of each head rotated; the adapter changes almost every completion.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from build_random_phi2 import phi2_config, write_random_phi
from lit_phi2.adapters.adapter import Adapter, make_adapter
from lit_phi2.data.encode import tokenize
from lit_phi2.data.prompts import format_prompt
from lit_phi2.data.sources import CLAIMS_DIR
from lit_phi2.export.card import CardFacts, versions
from lit_phi2.export.exporter import export, plan_export
from lit_phi2.export.gguf import write_gguf_model
from lit_phi2.export.llama_cpp import LlamaCppProcess
from lit_phi2.export.parity import Parity, Reference, run_reference
from lit_phi2.export.weights import ModelWeights
from lit_phi2.model.loading import load_phi2
from lit_phi2.model.lora import LoraSettings, adapter_state_dict, add_lora, trainable_parameters
from lit_phi2.pretrained import BaseModel, load_tokenizer, resolve_base_model
from lit_phi2.utils.files import read_json_lines

FORMATS = [
    ("peft", "float32"),
    ("merged", "float32"),
    ("gguf", "float32"),
    ("gguf-merged", "float32"),
    ("mlx", "float32"),
    ("merged", "bfloat16"),
    ("merged", "float16"),
    ("gguf-merged", "bfloat16"),
    ("gguf-merged", "float16"),
    ("gguf-merged", "q8_0"),
]
SETTINGS = LoraSettings(4, 8, ("Wqkv", "dense", "fc1", "fc2"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with Phi-2's tokenizer.json")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32, help="of each completion")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = build_base(folder / "phi", args.tokenizer)
        check_tokens(base, folder / "base.gguf")
        adapter, reference = random_adapter(base, args.prompts, args.tokens)
        print(f"the adapter moves a distribution by up to {reference.adapter_effect:.1f} nats")
        print(
            "| format, dtype | equal completions | equal tokens | largest KL, nats | largest difference | widest gap |"
        )
        print("|---|---|---|---|---|---|")
        for format, dtype in FORMATS:
            plan = plan_export(adapter, base, folder / "out", format=format, dtype=dtype, source="adapter")
            check = export(plan, reference, CardFacts())
            assert check.parity is not None, check.summary  # its runtime is not installed
            print(f"| `{format}` {dtype} | {row(check.parity)} |", flush=True)
    print(json.dumps(versions()))


def row(parity: Parity) -> str:
    """The figures of a format; the widest gap is how much likelier a token is that the runtime does not choose."""
    tokens = f"{parity.equal_tokens:,} of {parity.num_tokens:,}"
    completions = f"{parity.equal_completions} of {parity.num_prompts}"
    return f"{completions} | {tokens} | {parity.max_kl:.1e} | {parity.max_difference:.1e} | {parity.widest_gap:.1e}"


def build_base(folder: Path, tokenizer: Path) -> BaseModel:
    """Weights of standard deviation 0.1, so that a wrong rotation shows; biases and norms away from 0 and 1."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    config = phi2_config(2, hidden_size=256, intermediate_size=1024, num_attention_heads=4, rope_parameters=rope)
    write_random_phi(folder, config, tokenizer_dir=tokenizer, device="cpu")
    file, generator = folder / "model.safetensors", torch.Generator().manual_seed(0)
    weights = {}
    for name, weight in load_file(file).items():
        drawn = torch.randn(weight.shape, generator=generator) * 0.1
        weights[name] = weight.float() + drawn if weight.ndim == 1 else drawn
    save_file(weights, file, {"format": "pt"})
    return resolve_base_model(str(folder))


def check_tokens(base: BaseModel, file: Path) -> None:
    """Compare llama.cpp's tokens of every packaged test record with the tokenizer's."""
    tokenizer = load_tokenizer(base)
    write_gguf_model(ModelWeights(base, None), tokenizer, file, "float16")
    rows = list(read_json_lines(CLAIMS_DIR / "test.jsonl"))
    texts = [text for row in rows for text in (prompt_of(row), row["response"])]
    expected = tokenize(tokenizer, texts)
    with LlamaCppProcess(file, None, context=64, num_threads=torch.get_num_threads()) as process:
        equal = sum(process.tokenize(text) == ids for text, ids in zip(texts, expected, strict=True))
    print(f"token ids: {equal} of {len(texts)} texts of {len(rows)} test records equal")
    file.unlink()


def random_adapter(base: BaseModel, num_prompts: int, num_tokens: int) -> tuple[Adapter, Reference]:
    """An adapter whose update is as large as the weights, and what the running model says with it."""
    phi = add_lora(load_phi2(base, torch.float32), SETTINGS, dropout=0.0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable_parameters(phi).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    tokenizer = load_tokenizer(base)
    rows = list(read_json_lines(CLAIMS_DIR / "test.jsonl"))
    prompts = tokenize(tokenizer, [prompt_of(row) for row in rows[:num_prompts]])
    eos = int(tokenizer.eos_token_id)
    reference = run_reference(phi.eval(), prompts, eos_token_id=eos, max_tokens=num_tokens)
    return make_adapter(base, SETTINGS, adapter_state_dict(phi)), reference


def prompt_of(row: dict[str, str]) -> str:
    """The prompt of a record."""
    return format_prompt(row["instruction"], row.get("input", ""))


if __name__ == "__main__":
    main()
