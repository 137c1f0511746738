"""Write a Phi-2 of the true shape with random weights, in Hugging Face form: to measure speed, memory and loading.

    python scripts/build_random_phi2.py OUT --tokenizer FOLDER               2.78 B parameters, 5.6 GB, two shards
    python scripts/build_random_phi2.py OUT --tokenizer FOLDER --layers 4    a slice of the true width

FOLDER holds Phi-2's tokenizer.json and tokenizer_config.json; an answer of such a model means nothing.
"""

import argparse
import shutil
from pathlib import Path

import torch
from transformers import PhiConfig, PhiForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a Phi-2 of the true shape with random weights.")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with Phi-2's tokenizer.json")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    # https://huggingface.co/microsoft/phi-2/blob/main/config.json
    config = PhiConfig(
        vocab_size=51200,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=arguments.layers,
        num_attention_heads=32,
        max_position_embeddings=2048,
        resid_pdrop=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4},
        bos_token_id=50256,
        eos_token_id=50256,
    )
    torch.manual_seed(arguments.seed)
    with torch.device("meta"):
        model = PhiForCausalLM(config).half()  # the dtype in which Phi-2 is saved
    model = model.to_empty(device="cuda" if torch.cuda.is_available() else "cpu")  # drawn in a second, or in minutes
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.02)
        else:
            parameter.data.fill_(1.0 if "layernorm.weight" in name else 0.0)
    model.save_pretrained(arguments.output_dir, max_shard_size="5GB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(arguments.tokenizer / name, arguments.output_dir)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {arguments.output_dir}")


if __name__ == "__main__":
    main()
