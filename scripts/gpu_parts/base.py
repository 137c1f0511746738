"""Base: a Phi with random weights, made on the device and written to disk, where every other part loads it from."""

import time
from collections.abc import Iterator
from typing import Any

import psutil
import torch

from build_random_phi2 import phi2_config, write_random_phi
from gpu_parts.settings import Settings
from lit_phi2.pretrained import TINY_PHI_DIR, load_tokenizer, resolve_base_model

LAYER_BYTES = 2 * 78.7e6  # of a block of Phi-2's width in 16 bits
OTHER_BYTES = 2 * 262.2e6  # embedding and output layer
STEP_BYTES = 3e9  # of the smallest step of the peers


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    began = time.perf_counter()
    tokenizer = load_tokenizer(resolve_base_model("tiny"))  # ids of the packaged tokenizer are below every vocab_size
    eos_token_id = tokenizer.eos_token_id
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
    layers = settings.layers if settings.tiny else min(settings.layers, fitting_layers(memory_bytes(settings.device)))
    config = phi2_config(
        layers, bos_token_id=eos_token_id, eos_token_id=eos_token_id, **(sizes if settings.tiny else {})
    )
    parameters = write_random_phi(settings.base_dir, config, tokenizer_dir=TINY_PHI_DIR, device=settings.device)
    seconds = time.perf_counter() - began
    yield {
        "parameters": parameters,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "summary": f"{parameters:,} parameters, {layers} layers, in {seconds:.1f} s",
    }


def fitting_layers(memory: float) -> int:
    """Blocks of Phi-2's width that a device trains in 16 bits.

    >>> fitting_layers(16e9) >= 32, 4 <= fitting_layers(8e9) < 32
    (True, True)
    """
    return max(2, int((memory - OTHER_BYTES - STEP_BYTES) / LAYER_BYTES))


def memory_bytes(device: str) -> int:
    """Of the card; of a Mac or a CPU what is free."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    return int(psutil.virtual_memory().available)
