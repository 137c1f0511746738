"""Weights: the tensors of a base one at a time, each with the adapter's update merged into it in float32.

    W (out, in) as saved, A (r, in), B (out, r)  ->  W + scale B A, float32            layers with an adapter
    W as saved                                   ->  W as saved                         everything else

Names are those of transformers' Phi, where q, k and v are apart. Nothing is rounded here: who writes a tensor rounds it
once, to the dtype of the file. One tensor is in memory at a time, and the rest of the base stays on disk.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_phi2.adapters.adapter import Adapter
from lit_phi2.adapters.peft_format import split_qkv
from lit_phi2.base_config import make_phi_config
from lit_phi2.errors import InputError
from lit_phi2.export.metadata import lora_scale
from lit_phi2.model.loading import check_weights, iter_weights
from lit_phi2.pretrained import BaseModel, read_model_config

_PEFT_PREFIX, _LORA_A, _LORA_B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, slots=True)
class LoraPair:
    """The update of one linear layer, scale B A.

    Attributes:
        a: (r, in), float32.
        b: (out, r), float32.
        scale: of B A.
    """

    a: Tensor
    b: Tensor
    scale: float


def lora_pairs(adapter: Adapter) -> dict[str, LoraPair]:
    """Name of each adapted layer of transformers' Phi, such as model.layers.0.self_attn.q_proj -> its update.

    Raises:
        InputError: a matrix has no partner, or the ranks of two partners differ.
    """
    weights = split_qkv(adapter.weights)
    scale = lora_scale(adapter.settings)
    pairs = {}
    for name in sorted(weights):
        layer = name.removeprefix(_PEFT_PREFIX).removesuffix(_LORA_A)
        a, b = weights[name], weights.get(f"{_PEFT_PREFIX}{layer}{_LORA_B}")
        if name.endswith(_LORA_A) and b is not None and a.ndim == b.ndim == 2 and len(a) == b.shape[1]:
            pairs[layer] = LoraPair(a.float(), b.float(), scale)
    if 2 * len(pairs) != len(weights):
        raise InputError("the adapter is damaged: a matrix A without its B of the same rank, or the reverse.")
    return pairs


def merge_lora(weight: Tensor, pair: LoraPair) -> Tensor:
    """(out, in), any dtype -> (out, in) float32, the weight with the update added."""
    return torch.addmm(weight.float(), pair.b, pair.a, alpha=pair.scale)


class ModelWeights:
    """The tensors of a base, with or without an adapter merged; iterating reads them from disk in the files' order.

    Args:
        base: its weights are not loaded.
        adapter: fits the base (`check_adapter`); None for the base alone.

    Attributes:
        config: of the base.
        rope: its rotary settings, in the form of transformers 5.
        head_dim: width of an attention head.
        shapes: name -> shape, in the order of iteration.
        saved_dtype: of most elements in the base's files.

    Raises:
        InputError: the weights are damaged, or are not those of the base's config.json.
    """

    def __init__(self, base: BaseModel, adapter: Adapter | None) -> None:
        check_weights(base)
        self.base = base
        values = read_model_config(base)
        self.config = make_phi_config(values)
        self.rope: dict[str, Any] = values["rope_parameters"]
        self.head_dim: int = values.get("head_dim", self.config.hidden_size // self.config.num_attention_heads)
        self._pairs = {} if adapter is None else lora_pairs(adapter)
        self.shapes: dict[str, torch.Size] = {}
        num_elements: dict[torch.dtype, int] = {}
        for name, weight in iter_weights(base):  # mapped from the file, and not read
            self.shapes[name] = weight.shape
            num_elements[weight.dtype] = num_elements.get(weight.dtype, 0) + weight.numel()
        self.saved_dtype = max(num_elements, key=num_elements.__getitem__)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in iter_weights(self.base):
            pair = self._pairs.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            yield name, weight if pair is None else merge_lora(weight, pair)


def round_to(weight: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The weight in dtype, contiguous, rounded once.

    Raises:
        InputError: a value is too large for the dtype.
    """
    rounded = weight.to(dtype).contiguous()
    if dtype == torch.float16 and weight.dtype != dtype and not rounded.isfinite().all():
        raise InputError(f"--dtype float16: {name} has values beyond its largest, 65504. Use bfloat16 or float32.")
    return rounded
