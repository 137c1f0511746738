"""What the tests of exports share: a tokenizer laid out as Phi-2's, adapters, and the model as lit_phi2 runs it."""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PhiConfig, PhiForCausalLM

from lit_phi2.adapters.adapter import Adapter, make_adapter
from lit_phi2.data.encode import tokenize
from lit_phi2.data.prompts import format_prompt
from lit_phi2.data.sources import CLAIMS_DIR
from lit_phi2.export.parity import Reference, run_reference
from lit_phi2.model.loading import load_phi2
from lit_phi2.model.lora import (
    LoraSettings,
    PeftModel,
    adapter_state_dict,
    add_lora,
    load_adapter_state_dict,
    trainable_parameters,
)
from lit_phi2.pretrained import BaseModel, load_tokenizer

WIDTH, ROWS, EOS = 256, 2048, "<|endoftext|>"
SETTINGS = LoraSettings(4, 8, ("Wqkv", "dense", "fc1", "fc2"))


def claims_prompts(split: str) -> list[str]:
    """The prompts of the packaged records."""
    rows = map(json.loads, (CLAIMS_DIR / f"{split}.jsonl").read_text("utf-8").splitlines())
    return [format_prompt(row["instruction"], row.get("input", "")) for row in rows]


def gpt2_layout_tokenizer() -> Tokenizer:
    """Byte-level BPE split by GPT-2's pattern, with Phi-2's order: pieces, EOS, runs of spaces, runs of tabs."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1800, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(claims_prompts("train")[:500], trainer)
    tokenizer.add_special_tokens([AddedToken(EOS, special=True)])
    runs = [" " * length for length in range(31, 1, -1)] + ["\t" * length for length in range(9, 1, -1)]
    tokenizer.add_tokens([AddedToken(run, normalized=True) for run in runs])
    return tokenizer


def write_random_phi(folder: Path) -> None:
    """Two layers, 256 wide, float32; half of each head is rotated, where Phi-2 rotates 0.4 of it.

    Weights of standard deviation 0.1, so that attention is far from uniform and a wrong rotation shows, and biases and
    norms away from 0 and 1, so that a lost one shows.
    """
    tokenizer = gpt2_layout_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "bos_token": EOS, "unk_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    eos = tokenizer.token_to_id(EOS)
    config = PhiConfig(
        vocab_size=ROWS,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        bos_token_id=eos,
        eos_token_id=eos,
    )
    torch.manual_seed(0)
    model = PhiForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)


def random_adapter(base: BaseModel, settings: LoraSettings = SETTINGS, seed: int = 1) -> Adapter:
    """An adapter whose update is as large as the weights, so that it changes almost every completion."""
    phi = add_lora(load_phi2(base, torch.float32), settings, dropout=0.0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(phi).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return make_adapter(base, settings, adapter_state_dict(phi))


def running_model(base: BaseModel, adapter: Adapter) -> PeftModel:
    """The adapter on its base in float32, as lit_phi2 runs it."""
    phi = add_lora(load_phi2(base, torch.float32), adapter.settings, dropout=0.0)
    load_adapter_state_dict(phi, adapter.weights, source="adapter")
    return phi.eval()


def reference_of(base: BaseModel, adapter: Adapter, num_prompts: int, max_tokens: int = 32) -> Reference:
    """What the running model says to prompts of the packaged test records."""
    tokenizer = load_tokenizer(base)
    prompts = tokenize(tokenizer, claims_prompts("test")[:num_prompts])
    eos = tokenizer.eos_token_id
    return run_reference(running_model(base, adapter), prompts, eos_token_id=eos, max_tokens=max_tokens)
