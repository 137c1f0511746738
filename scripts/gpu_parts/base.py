"""Base: a Phi with random weights, made on the device and written to disk, where every other part loads it from."""

import time
from collections.abc import Iterator
from typing import Any

from build_random_phi2 import phi2_config, write_random_phi
from gpu_parts.settings import Settings
from lit_phi2.pretrained import TINY_PHI_DIR, load_tokenizer, resolve_base_model


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    began = time.perf_counter()
    tokenizer = load_tokenizer(resolve_base_model("tiny"))  # ids of the packaged tokenizer are below every vocab_size
    eos_token_id = tokenizer.eos_token_id
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
    config = phi2_config(
        settings.layers, bos_token_id=eos_token_id, eos_token_id=eos_token_id, **(sizes if settings.tiny else {})
    )
    parameters = write_random_phi(settings.base_dir, config, tokenizer_dir=TINY_PHI_DIR, device=settings.device)
    seconds = time.perf_counter() - began
    yield {
        "parameters": parameters,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "summary": f"{parameters:,} parameters in {seconds:.1f} s",
    }
