"""Calibration: the error of every product in 8 bits on a user's own records, and what is done about it.

    first records -> the model, layer by layer:  input x, the weight W as it is in the files
      |x W^T in int8 - x W^T| / |x W^T|  -> above COLUMNS_FROM: large columns of x are multiplied as they are
                                         -> still above MAX_ERROR: the layer gets its weight back in the compute dtype
                                         -> a table, by layer: kept in checkpoints, so that every command has the same

A few channels of large models are tens of times as large as the rest in every record (Dettmers et al. 2022,
arXiv:2208.07339, section 3; Sun et al. 2024, arXiv:2402.17762). One such channel would take the bits of all others.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from lit_phi2.model.linear import FrozenLinear
from lit_phi2.model.loading import frozen_linears, read_weight
from lit_phi2.model.phi2 import FusedPhiForCausalLM, packed_forward
from lit_phi2.model.quantization import Int8Linear, set_outliers
from lit_phi2.pretrained import BaseModel

log = logging.getLogger(__name__)

COLUMNS_FROM = 0.03  # error of a product; rounding alone costs 0.01 to 0.03
MAX_ERROR = 0.1
OUTLIER_RATIO = 16.0  # a column is an outlier whose largest value is so many times the root mean square of all
MAX_COLUMNS = 64  # of a layer; so few cost little, and more mean that the layer is better left alone
BLOCK_FEATURES = 4096
MAX_TOKENS = 512  # that are measured


class LayerError(TypedDict):
    """What a layer's product loses in 8 bits, and how it is multiplied.

    Attributes:
        error: relative, with the columns below; of the product in 8 bits even where the layer has its weight back.
        columns: input features that are multiplied as they are.
        is_quantized: false where the layer has its weight back.
    """

    error: float
    columns: list[int]
    is_quantized: bool


QuantizationTable = dict[str, LayerError]


@torch.no_grad()
def calibrate(model: FusedPhiForCausalLM, base: BaseModel, examples: Iterable[Sequence[int]]) -> QuantizationTable:
    """Measure every int8 layer on some examples, and set outlier columns and weights of the model accordingly.

    Args:
        model: quantized, without adapters, in eval mode.
        base: whose files have the weights as they were.
        examples: token ids; the first MAX_TOKENS are used.

    Returns:
        By name of the layer, in the order of the forward pass.
    """
    ids, positions = _pack(examples)
    table: QuantizationTable = {}
    layers = {name: layer for name, layer in frozen_linears(model).items() if isinstance(layer, Int8Linear)}
    hooks = [layer.register_forward_pre_hook(partial(_measure, name, base, table)) for name, layer in layers.items()]
    try:
        hidden = packed_forward(model, ids, positions)
        model.lm_head(hidden[:, -1:])  # one position: its rows are alike, and there are 51,200 features
    finally:
        for hook in hooks:
            hook.remove()
    return table


def apply_table(model: FusedPhiForCausalLM, base: BaseModel, table: Mapping[str, LayerError]) -> None:
    """Set outlier columns and weights as they were found before."""
    layers: Mapping[str, Any] = frozen_linears(model)
    for name, found in table.items():
        _use(layers[name], found, partial(read_weight, base, name))


def describe_table(table: Mapping[str, LayerError]) -> str:
    """One line about the worst layer and what is not in 8 bits."""
    worst = max(table, key=lambda name: table[name]["error"])
    line = f"products of {len(table)} layers lose at most {100 * table[worst]['error']:.1f} % in 8 bits ({worst})"
    columns = {name: len(found["columns"]) for name, found in table.items() if found["columns"]}
    if columns:
        most = max(columns, key=columns.__getitem__)
        line += f"; outlier columns are multiplied as they are, {columns[most]} in {most}"
        line += f" and others in {len(columns) - 1} more layers" if len(columns) > 1 else ""
    if kept := [name for name, found in table.items() if not found["is_quantized"]]:
        line += f"; above {100 * MAX_ERROR:.0f} %, so left in the compute dtype: {', '.join(kept)}"
    return line


def format_table(table: Mapping[str, LayerError]) -> str:
    """A line for each layer."""
    width = max(map(len, table))
    lines = [f"{'layer':<{width}}  error    outlier columns  weight"]
    for name, found in table.items():
        weight = "8 bits" if found["is_quantized"] else "compute dtype"
        lines.append(f"{name:<{width}}  {100 * found['error']:5.2f} %  {len(found['columns']):15d}  {weight}")
    return "\n".join(lines)


def _pack(examples: Iterable[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and positions of one row, (1, T) each."""
    ids: list[int] = []
    positions: list[int] = []
    for example in examples:
        ids += example
        positions += range(len(example))
        if len(ids) >= MAX_TOKENS:
            break
    return torch.tensor([ids[:MAX_TOKENS]]), torch.tensor([positions[:MAX_TOKENS]])


def _measure(name: str, base: BaseModel, table: QuantizationTable, layer: Int8Linear, inputs: tuple[Tensor]) -> None:
    x = inputs[0].flatten(0, -2).float()
    weight = read_weight(base, name)
    found: LayerError = {"error": relative_error(layer, x, weight), "columns": [], "is_quantized": True}
    if not found["error"] <= COLUMNS_FROM:
        found["columns"] = outlier_columns(x)
        set_outliers(layer, found["columns"], weight)
        found["error"] = relative_error(layer, x, weight)
        found["is_quantized"] = found["error"] <= MAX_ERROR
    table[name] = found
    _use(layer, found, lambda: weight)


def relative_error(layer: Int8Linear, x: Tensor, weight: Tensor) -> float:
    """|product of the layer - x W^T| / |x W^T|, some output features at a time: W is never whole in float32."""
    error = norm = x.new_zeros(())
    for start in range(0, len(weight), BLOCK_FEATURES):
        features = slice(start, start + BLOCK_FEATURES)
        product = x @ weight[features].float().t()
        error = error + (layer.matmul(x, features=features, use_bias=False) - product).square().sum()
        norm = norm + product.square().sum()
    return (error / norm).sqrt().item()


def outlier_columns(x: Tensor) -> list[int]:
    """The columns of x, (N, K), whose largest value is far above the rest; the MAX_COLUMNS largest of them."""
    largest = x.abs().amax(0)
    # Outliers raise the root mean square itself, so it is that of the columns below the median of the largest values.
    typical = x[:, largest <= largest.median()].square().mean().sqrt()
    values, columns = largest.topk(min(MAX_COLUMNS, len(largest)))
    return sorted(columns[values > OUTLIER_RATIO * typical].tolist())


def _use(layer: Any, found: LayerError, read: Callable[[], Tensor]) -> None:
    """Set the outlier columns of a layer, or give it its weight back."""
    if not isinstance(layer, Int8Linear):
        return
    if found["is_quantized"]:
        if found["columns"]:
            set_outliers(layer, found["columns"], read())
        return
    weight: Any = nn.Parameter(read().to(layer.dtype), requires_grad=False)
    for name in ("weight_scale", "outlier_columns", "outlier_weight"):
        delattr(layer, name)
    whole: Any = layer
    whole.__class__, whole.weight = FrozenLinear, weight
