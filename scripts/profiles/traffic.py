"""Traffic: what a block of Phi-2's width reads and writes on a GPU, counted without one.

block forward and backward over N tokens, on the meta device -> by kind: kernels, MB of their operands, TFLOP

The meta device takes the ways of a GPU and has shapes only. Counted are the operands of each operator, not what a cache
saves; views count nothing. A block is the difference between models of two layers and of one.
"""

import argparse
from collections import Counter
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PhiConfig

from peers.task import LORA_ALPHA, LORA_R

PRODUCTS = ("mm", "addmm", "addmm_")
KINDS = {"gelu": "GELU", "layer_norm": "norm", "dropout": "dropout", "attn": "attention"}  # by a part of the name
SKINNY = 64  # a product with a side of at most so many is LoRA's
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach")
WRITE_ONLY = ("copy_", "fill_", "zero_")  # do not read what they overwrite


def traffic(args: argparse.Namespace) -> None:
    """A table by kind."""
    print("| kernels of a block | count | MB | TFLOP |\n|---|---|---|---|")
    counters = [count(layers, args.tokens) for layers in (1, 2)]
    for kind, sums in counters[1].items():
        calls, num_bytes, flops = (two - one for one, two in zip(counters[0][kind], sums, strict=True))
        print(f"| {kind} | {calls} | {num_bytes / 1e6:,.0f} | {flops / 1e12:.2f} |")


def count(layers: int, tokens: int) -> dict[str, tuple[int, int, int]]:
    """Kernels, bytes and FLOP by kind, of all layers."""
    from lit_phi2.model import phi2
    from lit_phi2.model.attention import PackedLayout
    from lit_phi2.model.lora import LoraSettings, add_lora, trainable_parameters

    config = PhiConfig(vocab_size=64, hidden_size=2560, intermediate_size=10240, num_hidden_layers=layers)
    config.num_attention_heads = config.num_key_value_heads = 32
    config.resid_pdrop = 0.1
    with torch.device("meta"):
        model = phi2.FusedPhiForCausalLM(config).bfloat16()
        phi = add_lora(model, LoraSettings(LORA_R, LORA_ALPHA, ("Wqkv", "fc1", "fc2")), dropout=0.0)
    phi.train()
    cu_seqlens = torch.zeros(2, dtype=torch.int32, device="meta")
    ids = torch.zeros(tokens // 512, 512, dtype=torch.int64, device="meta")

    def dropout(x: Tensor, p: float, *_: Any) -> Tensor:
        return torch.native_dropout(x, p, True)[0] if p else x  # one kernel, as CUDA has it

    def packed_layout(positions: Tensor, segments: list[tuple[int, int]]) -> PackedLayout:
        return PackedLayout(segments, cu_seqlens)

    ours = patch.object(phi2, "packed_layout", packed_layout)
    with patch.object(functional, "dropout", dropout), ours, Counting() as counting:
        hidden = phi2.packed_forward(model, ids, ids, segments=[(0, 512)])
        torch.autograd.grad(hidden, list(trainable_parameters(phi).values()), torch.ones_like(hidden))
    return {kind: (counting.calls[kind], counting.bytes[kind], counting.flops[kind]) for kind in counting.calls}


class Counting(TorchDispatchMode):
    """Counts by kind while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        is_view = any(a.alias_info and not a.alias_info.is_write for a in func._schema.arguments)
        if is_view or name in ALLOCATIONS:
            return out
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        written = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        kind = next((kind for part, kind in KINDS.items() if part in name), "rotary, sums, copies")
        flops = 0
        if name in PRODUCTS:
            a, b = read[-2:]
            flops = 2 * a.shape[0] * a.shape[1] * b.shape[1]
            kind = "products of LoRA" if min(*a.shape, *b.shape) <= SKINNY else "products"
        self.calls[kind] += 1
        self.bytes[kind] += sum(x.numel() * x.element_size() for x in read[name in WRITE_ONLY :] + written)
        self.flops[kind] += flops
        return out
