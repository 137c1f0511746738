"""Read back: the tensors in the files of an export, compared with those that were exported.

    an adapter    equal to the adapter that was exported; in GGUF to one rounding of B
    a model       within half a unit in the last place of its dtype

This finds what a run cannot: a fault that is smaller than the rounding of the runtime.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from lit_phi2.adapters.adapter import Adapter
from lit_phi2.adapters.peft_format import read_peft_folder
from lit_phi2.errors import InputError
from lit_phi2.export.commands import gguf_model_file
from lit_phi2.export.gguf_reader import read_gguf
from lit_phi2.export.imports import read_gguf_adapter, read_mlx_adapter
from lit_phi2.export.merged import shard_names
from lit_phi2.export.names import gguf_name
from lit_phi2.export.weights import ModelWeights, lora_pairs
from lit_phi2.utils.paths import GGUF_ADAPTER_FILE

# Half a unit in the last place, relative to the value; of q8_0 to the largest of its 32 values, whose scale is float16.
_ROUNDING = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8, "q8_0": 0.5 / 127 + 2**-10}
_BLOCK = 32  # elements of q8_0
_ROWS = 2048  # compared at once, so that the copies of an embedding stay small
_FLOAT16_STEP = 2**-25  # half of the smallest step of float16, for values too small for its precision
_FLOAT16_NORMAL = 2**-14  # below it, the precision of float16 falls


def read_back(folder: Path, *, format: str, dtype: str, adapter: Adapter | None, weights: ModelWeights) -> str:
    """Compare the files with what was exported; one line that says how far they are.

    Args:
        folder: of the export.
        format: peft, merged, gguf, gguf-merged or mlx.
        dtype: of the export.
        adapter: that was exported; None for the base alone.
        weights: that were exported, merged.

    Raises:
        InputError: they differ by more than rounding.
    """
    if format == "merged":
        files = shard_names(weights.shapes, getattr(torch, dtype).itemsize)
        difference = _compare_model(lambda name: _read_safetensors(folder / files[name], name), weights, dtype)
    elif format == "gguf-merged":
        tensors = read_gguf(folder / gguf_model_file(dtype))[1]
        difference = _compare_model(lambda name: tensors[gguf_name(name)].to_torch(), weights, dtype)
    else:
        assert adapter is not None
        if format == "gguf":
            written = read_gguf_adapter(folder / GGUF_ADAPTER_FILE)
        else:
            written = read_peft_folder(folder) if format == "peft" else read_mlx_adapter(folder)
        difference = _compare_adapters(written, adapter)
    return f"the tensors in the file were read back: {difference:.1e} off at most, relative to the value"


def _compare_adapters(written: Adapter, adapter: Adapter) -> float:
    pairs, expected = lora_pairs(written), lora_pairs(adapter)
    if pairs.keys() != expected.keys():
        raise InputError("export: refused, because the file holds other layers than the adapter. Nothing was written.")
    largest = 0.0
    for layer, pair in pairs.items():
        for value, other in ((pair.a, expected[layer].a), (pair.b, expected[layer].b)):
            largest = max(largest, _difference(value, other, "float32", layer, slack=2**-22))
    return largest


def _compare_model(read: Callable[[str], Tensor], weights: ModelWeights, dtype: str) -> float:
    largest = 0.0
    for name, weight in weights:
        kind = "float32" if weight.ndim == 1 and dtype == "q8_0" else dtype
        largest = max(largest, _difference(read(name), weight.float(), kind, name))
    return largest


def _read_safetensors(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor.float()


def _difference(value: Tensor, expected: Tensor, dtype: str, name: str, slack: float = 0.0) -> float:
    """The largest difference relative to the value; raises if one is more than rounding."""
    if value.shape != expected.shape:
        raise InputError(f"export: refused, because {name} in the file has another shape. Nothing was written.")
    largest, step = 0.0, 0.0 if dtype == "float32" else _FLOAT16_STEP
    smallest = _FLOAT16_NORMAL if dtype == "float16" else _FLOAT16_STEP  # smaller values are compared with this one
    for part, other in zip(value.split(_ROWS), expected.split(_ROWS), strict=True):
        size = other.abs()
        if dtype == "q8_0":
            size = size.unflatten(-1, (-1, _BLOCK)).amax(-1).repeat_interleave(_BLOCK, dim=-1)
        difference = (part - other).abs_()
        if not bool((difference <= (_ROUNDING[dtype] + slack) * size + step).all()):
            raise InputError(
                f"export: refused, because {name} in the file is not what was exported. Nothing was written."
            )
        largest = max(largest, float((difference / size.clamp_(min=smallest)).max()))
    return largest
