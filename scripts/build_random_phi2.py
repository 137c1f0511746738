"""Write a Phi-2 with random weights in Hugging Face form, to measure speed, memory and loading.

    python scripts/build_random_phi2.py OUT --tokenizer FOLDER               2.78 B parameters, 5.6 GB, two shards
    python scripts/build_random_phi2.py OUT --tokenizer FOLDER --layers 4    four layers of the true width

FOLDER holds Phi-2's tokenizer.json and tokenizer_config.json. Completions of such a model mean nothing.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PhiConfig, PhiForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with Phi-2's tokenizer.json")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"  # a second, or minutes
    config = phi2_config(args.layers)
    parameters = write_random_phi(args.output_dir, config, tokenizer_dir=args.tokenizer, device=device, seed=args.seed)
    print(f"{parameters:,} parameters in {args.output_dir}")


def phi2_config(layers: int = 32, **overrides: Any) -> PhiConfig:
    """Phi-2's config with another number of layers, or with other overrides."""
    # https://huggingface.co/microsoft/phi-2/blob/main/config.json
    settings: dict[str, Any] = {
        "vocab_size": 51200,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "resid_pdrop": 0.1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4},
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    }
    return PhiConfig(**(settings | overrides))


def write_random_phi(output_dir: Path, config: PhiConfig, *, tokenizer_dir: Path, device: str, seed: int = 0) -> int:
    """Draw the weights on the device and write them in float16, the dtype in which Phi-2 is saved.

    Returns:
        The number of parameters.
    """
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = PhiForCausalLM(config).half()
    model = model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.02)
        else:
            parameter.data.fill_(1.0 if "layernorm.weight" in name else 0.0)
    model.save_pretrained(output_dir, max_shard_size="5GB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_dir / name, output_dir)
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    main()
