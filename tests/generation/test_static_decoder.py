"""Passes of one shape for a GPU, run on the CPU: the same tokens as packed passes. On CUDA they are replayed graphs."""

import random
from pathlib import Path

import pytest
import torch

from helpers import DEVICES, new_module
from lit_phi2.generation.cache_attention import Segment
from lit_phi2.generation.decoder import Decoder
from lit_phi2.generation.engine import generate
from lit_phi2.generation.kv_cache import KVCache
from lit_phi2.generation.static_decoder import StaticDecoder
from lit_phi2.generation.weights import prepare_weights


def test_passes_of_one_shape_choose_the_tokens_of_packed_ones(phi_dir: Path) -> None:
    """Slots 0 and 3 are in use; the longest passes 256 positions, where the shape changes."""
    model = new_module(phi_dir).fused_phi
    decoder = Decoder(model, prepare_weights(model, use_adapter=True, num_rows=4, num_passes=None))
    generator = random.Random(0)
    prompts = {0: generator.choices(range(1, 1000), k=250), 3: generator.choices(range(1, 1000), k=9)}
    chosen: list[list[list[int]]] = []
    for is_static in (False, True):
        cache = KVCache(decoder.cache_shape, 4, 320, decoder.device)
        static = StaticDecoder(decoder, cache)
        sequences = {slot: prompt[:] for slot, prompt in prompts.items()}
        for slot, ids in sequences.items():
            ids += decoder.forward(cache, ids, [Segment(slot, 0, len(ids))], [len(ids) - 1])
        for _ in range(12):
            last = [(s[-1], len(s) - 1) if (s := sequences.get(slot)) else None for slot in range(4)]
            if is_static:
                tokens = static.forward(last)
            else:
                segments = [Segment(slot, len(ids) - 1, len(ids)) for slot, ids in sequences.items()]
                packed = decoder.forward(cache, [ids[-1] for ids in sequences.values()], segments)
                tokens = [packed[0], 0, 0, packed[1]]
            for slot, ids in sequences.items():
                ids.append(tokens[slot])
        chosen.append(list(sequences.values()))
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize("device", DEVICES)
def test_a_gpu_gives_the_answers_of_the_cpu(phi_dir: Path, device: str) -> None:
    module = new_module(phi_dir)
    generator = random.Random(0)
    prompts = [generator.choices(range(1, 1000), k=generator.randrange(1, 80)) for _ in range(12)]

    def complete() -> list[list[int]]:
        completions = generate(module.fused_phi, prompts, eos_token_id=-1, max_new_tokens=20, max_slots=5)
        return [completion.ids for completion in completions]

    expected = complete()
    module.to(torch.device(device))
    pairs = list(zip(complete(), expected, strict=True))
    assert sum(one == other for one, other in pairs) > 0.8 * len(pairs)  # near ties may change places
