"""Weights: a model with LoRA in its layers -> the layers that decoding calls, the adapter merged where that pays.

    W, A, B  ->  W + scale B A, added in float32, rounded once          a copy, layer by layer, if memory allows
    W, A, B  ->  x W^T + scale (x A^T) B^T                              no copy: the model's own weights
    W        ->  the model's own weights, or a copy in the dtype and layout that this machine multiplies faster

The model is only read. A copy lasts as long as the engine.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name that torch's own documentation uses

from lit_phi2.model.linear import frozen_matmul
from lit_phi2.model.lora import LoraUpdate, lora_updates
from lit_phi2.model.phi2 import FusedPhiForCausalLM

log = logging.getLogger(__name__)

MIN_PASSES = 100  # a copy takes as long as some tens of passes
MEMORY_SHARE = 0.5  # of the available memory that a copy may take
MIN_SPEEDUP = 1.2  # of float32 over bfloat16: an answer should not depend on the noise of a measurement

Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class DecodingWeights:
    """What a pass calls.

    Attributes:
        embed: (V, D).
        blocks: as `block_forward` reads them.
        norm: (N, D) -> (N, D), before the head.
        head: (N, D) -> (N, V).
        dtype: of hidden states, keys and values.
        min_rows: fewest rows of a product, for which the sums of a row do not depend on the number of rows.
    """

    embed: Tensor
    blocks: list[Any]
    norm: Linear
    head: Linear
    dtype: torch.dtype
    min_rows: int


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
    updates = {layer: lora_updates(layer) if use_adapter else [] for layer in layers}
    has_adapter = any(updates.values())
    pays = num_passes is None or num_passes >= MIN_PASSES
    device, model_dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
    dtype, reason = model_dtype, ""
    copies_all = False
    if device.type == "cpu" and pays:
        numel = sum(base_layer(layer).weight.numel() for layer in [*layers, model.lm_head])
        if _fits(4 * numel, device):
            dtype, reason = _fastest_dtype(model.lm_head, num_rows)
            copies_all = dtype == torch.float32
    merged_bytes = sum(base_layer(layer).weight.nbytes for layer in layers if updates[layer])
    merges = has_adapter and pays and (copies_all or _fits(merged_bytes, device))
    make: Callable[[nn.Module], Linear] = partial(
        _make_linear, updates=updates, dtype=dtype, copies_all=copies_all, merges=merges
    )
    _log_choice(has_adapter, merges, pays, dtype, model_dtype, reason)
    return DecodingWeights(
        embed=model.model.embed_tokens.weight,
        blocks=[_make_block(block, make, dtype) for block in model.model.layers],
        norm=_layer_norm(model.model.final_layernorm, dtype),
        head=make(model.lm_head),
        dtype=dtype,
        min_rows=2 if copies_all else 1,  # one row is multiplied by another kernel, which adds in another order
    )


def _log_choice(
    has_adapter: bool, merges: bool, pays: bool, dtype: torch.dtype, model_dtype: torch.dtype, reason: str
) -> None:
    parts = []
    if has_adapter:
        why = "" if merges else " (too few tokens for a copy)" if not pays else " (a copy does not fit the memory)"
        parts.append(f"the adapter is {'merged into a copy of its layers' if merges else 'added in every pass'}{why}")
    if dtype != model_dtype:
        parts.append(f"{str(dtype).removeprefix('torch.')} copies of the weights: {reason}")
    if parts:
        log.info("decoding: %s", "; ".join(parts))


def base_layer(layer: Any) -> Any:
    """The linear layer itself, without LoRA."""
    return getattr(layer, "base_layer", layer)


def _linear_layers(block: Any) -> list[nn.Module]:
    return [block.self_attn.Wqkv, block.self_attn.dense, block.mlp.fc1, block.mlp.fc2]


def _make_block(block: Any, make: Callable[[nn.Module], Linear], dtype: torch.dtype) -> SimpleNamespace:
    """What `block_forward` reads of a Phi2Block, in eval mode."""
    wqkv, dense, fc1, fc2 = map(make, _linear_layers(block))
    attn = SimpleNamespace(Wqkv=wqkv, dense=dense, head_dim=block.self_attn.head_dim, scaling=block.self_attn.scaling)
    mlp = SimpleNamespace(fc1=fc1, fc2=fc2, activation_fn=block.mlp.activation_fn)
    norm = _layer_norm(block.input_layernorm, dtype)
    return SimpleNamespace(input_layernorm=norm, self_attn=attn, mlp=mlp, training=False)


def _layer_norm(norm: nn.LayerNorm, dtype: torch.dtype) -> Linear:
    weight, bias = norm.weight.detach().to(dtype), norm.bias.detach().to(dtype)
    shape, eps = tuple(norm.normalized_shape), norm.eps
    return lambda hidden: F.layer_norm(hidden, shape, weight, bias, eps)


def _make_linear(
    layer: nn.Module,
    *,
    updates: dict[nn.Module, list[LoraUpdate]],
    dtype: torch.dtype,
    copies_all: bool,
    merges: bool,
) -> Linear:
    base, lora = base_layer(layer), updates.get(layer, [])
    if not copies_all and not (merges and lora):
        return partial(_unmerged, base=base, updates=lora) if lora else base.matmul
    weight = base.weight.detach()
    for update in lora:
        weight = torch.addmm(weight.float(), update.b.float(), update.a.float(), alpha=update.scale)
    # Rows of inputs, contiguous: MKL multiplies few rows by it half again as fast, and adds in one order for any number.
    matrix = weight.to(dtype).t().contiguous() if copies_all else weight.to(dtype).t()
    bias = base.bias.detach().to(dtype)
    return lambda x: torch.addmm(bias, x, matrix)


def _unmerged(x: Tensor, *, base: Any, updates: list[LoraUpdate]) -> Tensor:
    first, *others = updates
    out: Tensor = base.matmul(
        x, lora_x=frozen_matmul(x, first.a.to(x.dtype).t()), lora_b=first.b.t(), scale=first.scale
    )
    for update in others:
        out = out + frozen_matmul(frozen_matmul(x, update.a.to(x.dtype).t()), update.b.to(x.dtype).t()) * update.scale
    return out


def _fits(num_bytes: int, device: torch.device) -> bool:
    return num_bytes <= MEMORY_SHARE * available_memory(device)


def available_memory(device: torch.device) -> int:
    """Bytes that a device has left."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    available: int = psutil.virtual_memory().available
    return available


def _fastest_dtype(head: Any, num_rows: int) -> tuple[torch.dtype, str]:
    """The dtype in which this CPU multiplies a few rows fastest, measured on a part of the head.

    A float32 model stays float32: its answers are those of float32.
    """
    weight = head.weight.detach()
    if weight.dtype == torch.float32:
        return weight.dtype, ""
    weight = weight[:4096]
    x = torch.ones(num_rows, weight.shape[1])
    matrices = {weight.dtype: weight.t(), torch.float32: weight.float().t().contiguous()}
    seconds = {dtype: _best_seconds(x.to(dtype), matrix) for dtype, matrix in matrices.items()}
    speedup = seconds[weight.dtype] / seconds[torch.float32]
    if speedup < MIN_SPEEDUP:
        return weight.dtype, ""
    return torch.float32, f"this CPU multiplies {num_rows} rows by them {speedup:.1f} times as fast"


def _best_seconds(x: Tensor, matrix: Tensor) -> float:
    def seconds() -> float:
        start = time.perf_counter()
        x @ matrix
        return time.perf_counter() - start

    return min(seconds() for _ in range(10))
