"""Blocks: milliseconds of a block with torch's own operations and with compiled ones, and the chunk of the loss.

one micro-batch of full rows -> block forward and backward, median of five; logits in memory at the same time
"""

from typing import Any

import torch

from gpu_parts.contenders import Arena, Contender
from lit_phi2.data.collate import collate
from lit_phi2.model.device import card_memory
from lit_phi2.model.fusion import EAGER, compile_ops
from lit_phi2.model.loss import logits_limit, vocab_chunk
from lit_phi2.training.block_ops import block_seconds
from peers.ours import to_examples


def measure_blocks(arena: Arena, contender: Contender, length: int, rows: int) -> dict[str, Any]:
    """Measure both kinds; a compiler that fails gives the first line of its error."""
    settings = arena.settings
    arena.load(contender, length, rows, contender.variant, settings.step_tokens)
    assert contender.task is not None
    model = contender.model.to(settings.device).fused_phi
    examples = to_examples(contender.task)[:rows]
    batch = collate(examples, [(index,) for index in range(rows)]).to(settings.device)
    result: dict[str, Any] = {"rows": rows, "length": length, "torch_ms": 1e3 * block_seconds(model, batch, EAGER)}
    backend = "inductor" if settings.device == "cuda" else "aot_eager"  # the latter tries this program, and no compiler
    try:
        result["compiled_ms"] = 1e3 * block_seconds(model, batch, compile_ops(backend))
    except Exception as error:  # whatever a compiler or the lack of one raises
        result["compile_error"] = f"{type(error).__name__}: {str(error).strip()[:300]}"
    device = torch.device(settings.device)
    limit, logit_bytes = logits_limit(device.type, card_memory(device)), 4 + model.lm_head.dtype.itemsize
    chunk = vocab_chunk(rows * length // 2, logit_bytes, model.config.vocab_size, device.type, limit)
    return {**result, "logits_mib": limit / 2**20, "vocab_chunk": chunk}
