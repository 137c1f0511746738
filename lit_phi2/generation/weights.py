"""Weights: a model with LoRA in its layers -> the layers that decoding calls, the adapter merged where that pays.

    W, A, B  ->  W + scale B A, added in float32, rounded once          a copy, layer by layer, if memory allows
    W, A, B  ->  x W^T + scale (x A^T) B^T                              no copy: the model's own weights
    W        ->  the model's own weights, or a copy in the dtype and layout that this machine multiplies faster
    int8     ->  the model's own weights; sums of int8 products are exact

The model is only read. A copy lasts as long as the engine.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name that torch's own documentation uses

from lit_phi2.generation.products import fastest, measure_products, merged, pack, packed_product
from lit_phi2.model.device import total_memory
from lit_phi2.model.linear import frozen_matmul
from lit_phi2.model.lora import LoraUpdate, lora_updates
from lit_phi2.model.phi2 import FusedPhiForCausalLM
from lit_phi2.model.quantization import Int8Linear, as_two_rows

log = logging.getLogger(__name__)

MIN_PASSES = 100  # a copy takes as long as some tens of passes
MEMORY_SHARE = 0.5  # of the available memory that a copy may take
PACKED_ROWS = 32  # of a product that packed weights give at least; drafts need some

Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class DecodingWeights:
    """What a pass calls.

    Attributes:
        embed: (V, D).
        blocks: as `block_forward` reads them.
        norm: (N, D) -> (N, D), before the head.
        head: (N, D) -> (N, V).
        dtype: of hidden states.
        cache_dtype: of keys and values: the model's.
        min_rows: fewest rows of a product with which the sums of a row do not depend on the number of rows.
    """

    embed: Tensor
    blocks: list[Any]
    norm: Linear
    head: Linear
    dtype: torch.dtype
    cache_dtype: torch.dtype
    min_rows: int


@dataclass(frozen=True, slots=True)
class _Plan:
    """How the layers are multiplied.

    Attributes:
        dtype: of hidden states and, where layers are copied, of the copies.
        copies_all: every layer is a copy, packed for products of few rows.
        merges: layers with an adapter are merged copies.
        native_rows: up to how many rows bfloat16 is multiplied as such, whatever `linear.py` does.
        reasons: parts of the log line.
    """

    dtype: torch.dtype
    copies_all: bool
    merges: bool
    native_rows: int
    reasons: list[str]


def prepare_weights(
    model: FusedPhiForCausalLM, *, use_adapter: bool, num_rows: int, num_passes: int | None
) -> DecodingWeights:
    """Choose between the model's own weights and copies, and say in one log line which and why.

    Args:
        model: with or without adapters in its layers.
        use_adapter: whether an adapter that is there counts.
        num_rows: of a decode pass.
        num_passes: that will be made; None for many.
    """
    layers = [layer for block in model.model.layers for layer in _linear_layers(block)]
    updates = {layer: lora_updates(layer) for layer in layers} if use_adapter else {}
    adapted = [layer for layer in layers if updates.get(layer)]
    pays = not model.is_streamed and (num_passes is None or num_passes >= MIN_PASSES)
    plan = _choose_plan(model, layers, adapted, num_rows, pays)
    if plan.reasons:
        log.info("decoding: %s", "; ".join(plan.reasons))

    def make(layer: nn.Module) -> Linear:
        return _make_linear(layer, updates.get(layer, []), plan)

    return DecodingWeights(
        embed=model.model.embed_tokens.weight.detach(),
        blocks=[_make_block(block, make, plan.dtype) for block in model.model.layers],
        norm=_layer_norm(model.model.final_layernorm, plan.dtype),
        head=make(model.lm_head),
        dtype=plan.dtype,
        cache_dtype=model.lm_head.dtype,
        # One row is multiplied by another kernel, which adds in another order; sums of int8 have no order.
        min_rows=2 if plan.dtype == torch.float32 and plan.copies_all else 1,
    )


def _choose_plan(
    model: FusedPhiForCausalLM, layers: list[nn.Module], adapted: list[nn.Module], num_rows: int, pays: bool
) -> _Plan:
    head: Any = model.lm_head
    dtype, native_rows, copies_all, reasons = head.dtype, 0, False, []
    if any(isinstance(base_layer(layer), Int8Linear) for layer in [*layers, head]):
        reasons = ["the adapter is added in every pass, because weights are in 8 bits"] if adapted else []
        return _Plan(dtype, copies_all, merges=False, native_rows=0, reasons=reasons)
    if head.weight.device.type == "cpu" and not model.is_streamed:
        numel = sum(base_layer(layer).weight.numel() for layer in [*layers, head])
        if dtype in (torch.float32, torch.float16):  # float16 is multiplied in float32 anyway (`linear.py`)
            copies_all = pays and _fits(4 * numel, head.weight.device)
            dtype = torch.float32 if copies_all else dtype
        else:
            products = {
                product.name: product
                for product in measure_products(head, num_rows, with_copies=pays)
                if _fits(product.copy_bytes * numel, head.weight.device)
            }
            chosen, own = fastest(products)
            copies_all = chosen.copy_bytes > 0
            dtype = torch.float32 if chosen.name == "float32" else dtype
            native_rows = {"native": num_rows, "packed": max(num_rows, PACKED_ROWS)}.get(chosen.name, 0)
            if copies_all:
                speedup = own.seconds / chosen.seconds
                reasons.append(
                    f"{chosen.name} copies of the weights, which this CPU multiplies {speedup:.1f} times as fast"
                )
    if adapted:
        num_bytes = sum(base_layer(layer).weight.nbytes for layer in adapted)
        fits = copies_all or _fits(num_bytes, head.weight.device)
        if pays and fits:
            reasons.insert(0, "the adapter is merged into a copy of its layers")
        else:
            why = f"a copy of {num_bytes / 1e6:,.0f} MB does not fit the memory" if pays else "few tokens are expected"
            reasons.insert(0, f"the adapter is added in every pass, because {why}")
    return _Plan(dtype, copies_all, bool(adapted) and pays and fits, native_rows, reasons)


def base_layer(layer: Any) -> Any:
    """The linear layer itself, without LoRA."""
    return getattr(layer, "base_layer", layer)


def _linear_layers(block: Any) -> list[nn.Module]:
    return [block.self_attn.Wqkv, block.self_attn.dense, block.mlp.fc1, block.mlp.fc2]


def _make_block(block: Any, make: Callable[[nn.Module], Linear], dtype: torch.dtype) -> SimpleNamespace:
    """What `block_forward` reads of a Phi2Block, in eval mode."""
    wqkv, dense, fc1, fc2 = map(make, _linear_layers(block))
    attn = SimpleNamespace(Wqkv=wqkv, dense=dense, head_dim=block.self_attn.head_dim)
    mlp = SimpleNamespace(fc1=fc1, fc2=fc2, activation_fn=block.mlp.activation_fn)
    norm = _layer_norm(block.input_layernorm, dtype)
    return SimpleNamespace(input_layernorm=norm, self_attn=attn, mlp=mlp, training=False)


def _layer_norm(norm: nn.LayerNorm, dtype: torch.dtype) -> Linear:
    if norm.weight.dtype == dtype:
        return norm
    weight, bias = norm.weight.detach().to(dtype), norm.bias.detach().to(dtype)
    shape, eps = tuple(norm.normalized_shape), norm.eps
    return lambda hidden: F.layer_norm(hidden, shape, weight, bias, eps)


def _make_linear(layer: nn.Module, updates: list[LoraUpdate], plan: _Plan) -> Linear:
    base = base_layer(layer)
    if not plan.copies_all and not (plan.merges and updates):
        return _shared_linear(base, updates, plan.native_rows)
    weight = merged(base, updates, plan.dtype)
    bias = base.bias.detach().to(plan.dtype)
    if not plan.copies_all or not torch.backends.mkldnn.is_available():
        return partial(_product, matrix=weight.t(), bias=bias, native_rows=plan.native_rows)
    packed = pack(weight)
    if plan.dtype == torch.float32:
        return partial(packed_product, packed=packed, bias=bias)
    shared = _shared_linear(base, updates, 0)  # for long prompts; an unpacked merged copy would be one more model
    native_rows = plan.native_rows
    return lambda x: packed_product(x, packed, bias) if len(x) <= native_rows else shared(x)


def _product(x: Tensor, *, matrix: Tensor, bias: Tensor, native_rows: int) -> Tensor:
    """x matrix + bias."""
    return torch.addmm(bias, x, matrix) if len(x) <= native_rows else frozen_matmul(x, matrix, bias=bias)


def _shared_linear(base: Any, updates: list[LoraUpdate], native_rows: int) -> Linear:
    """x W^T + bias with the model's own weight, and the update of every adapter."""
    products = [(_low_rank_product(update, base), update.scale) for update in updates]

    def product(x: Tensor) -> Tensor:
        out = F.linear(x, base.weight, base.bias) if len(x) <= native_rows else base.matmul(x)
        for low_rank, scale in products:
            out = out.add_(low_rank(x), alpha=scale)
        return out

    return product


def _low_rank_product(update: LoraUpdate, base: Any) -> Linear:
    """x A^T B^T, in the dtype of the layer."""
    a, b = update.a.to(base.dtype), update.b.to(base.dtype)
    if base.dtype == torch.float32 and a.device.type == "cpu" and torch.backends.mkldnn.is_available():
        packed_a, packed_b = pack(a), pack(b)
        return lambda x: packed_product(packed_product(as_two_rows(x), packed_a, None), packed_b, None)[: len(x)]
    return lambda x: frozen_matmul(frozen_matmul(x, a.t()), b.t())


def _fits(num_bytes: int, device: torch.device) -> bool:
    return num_bytes <= MEMORY_SHARE * available_memory(device)


def available_memory(device: torch.device) -> int:
    """Bytes that a device has left; on a CPU no more than the container's limit leaves this process."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    available: int = psutil.virtual_memory().available
    return max(0, min(available, total_memory() - psutil.Process().memory_info().rss))
