"""Imports: adapters that `gguf` and `mlx` exports hold, read back.

    adapter.gguf                                   ->  Adapter
    adapters.safetensors and adapter_config.json   ->  Adapter

Equal to the exported adapter bit for bit; in GGUF where the scale is a power of two, elsewhere to one rounding of B.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from lit_phi2.adapters.adapter import Adapter
from lit_phi2.errors import InputError
from lit_phi2.export.gguf_reader import ADAPTER_KEY, ARCHITECTURE, read_gguf
from lit_phi2.export.metadata import adapter_from_metadata, check_metadata, lora_scale, settings_from_metadata
from lit_phi2.export.names import hf_name
from lit_phi2.utils.json_objects import read_json_object

MLX_WEIGHTS_FILE, MLX_CONFIG_FILE, MLX_KEY = "adapters.safetensors", "adapter_config.json", "lit_phi2"
_PEFT_PREFIX = "base_model.model."


def read_gguf_adapter(path: Path) -> Adapter:
    """The adapter in a GGUF file that lit_phi2 wrote.

    Raises:
        InputError: the file is missing, damaged or hostile, or another tool wrote it.
    """
    keys, tensors = read_gguf(path)
    expected = {"general.architecture": ARCHITECTURE, "general.type": "adapter", "adapter.type": "lora"}
    for key, value in expected.items():
        if keys.get(key) != value:
            raise InputError(f"{path}: is no LoRA adapter for Phi-2: {key} is {keys.get(key)!r}, expected {value!r}.")
    if ADAPTER_KEY not in keys:
        raise InputError(f"{path}: has no key {ADAPTER_KEY}: only a GGUF adapter that lit_phi2 wrote can be imported.")
    metadata = _checked_json(keys[ADAPTER_KEY], path)
    alpha = keys.get("adapter.lora.alpha")
    if not isinstance(alpha, float) or not math.isfinite(alpha) or alpha <= 0:
        raise InputError(f"{path}: adapter.lora.alpha is {alpha!r}; expected a number above 0.")
    weights = {}
    for name, tensor in tensors.items():
        parameter, _, matrix = name.rpartition(".")
        layer = hf_name(parameter)
        if layer is None or matrix not in ("lora_a", "lora_b") or len(tensor.shape) != 2:
            raise InputError(f"{path}: has a tensor {name[:80]!r} of shape {tensor.shape}, which no adapter has.")
        weights[_peft_name(layer.removesuffix(".weight"), matrix)] = tensor.to_torch()
    return _adapter(metadata, _unscaled(weights, alpha, metadata), source=str(path))


def read_mlx_adapter(folder: Path) -> Adapter:
    """The adapter in a folder for mlx-lm that lit_phi2 wrote.

    Raises:
        InputError: a file is missing or damaged, or another tool wrote it.
    """
    config = read_json_object(folder / MLX_CONFIG_FILE)
    try:
        tensors = load_file(folder / MLX_WEIGHTS_FILE)
    except Exception as error:  # missing, damaged, or not what its name says
        raise InputError(f"{folder / MLX_WEIGHTS_FILE}: cannot be read ({error}).") from error
    if MLX_KEY not in config:
        raise InputError(
            f"{folder / MLX_CONFIG_FILE}: has no key {MLX_KEY}: only an MLX adapter that lit_phi2 wrote can "
            "be imported."
        )
    metadata = check_metadata(config[MLX_KEY], source=str(folder / MLX_CONFIG_FILE))
    weights = {}
    for name, tensor in tensors.items():
        layer, _, matrix = name.rpartition(".")
        if matrix not in ("lora_a", "lora_b") or tensor.ndim != 2:
            raise InputError(f"{folder / MLX_WEIGHTS_FILE}: has a tensor {name[:80]!r}, which no adapter has.")
        weights[_peft_name(layer, matrix)] = tensor.float().t().contiguous()
    return _adapter(metadata, weights, source=str(folder))


def is_mlx_adapter(folder: Path) -> bool:
    """Whether a folder holds an MLX adapter, which has the name of its config in common with PEFT."""
    return (folder / MLX_WEIGHTS_FILE).is_file()


def _checked_json(text: Any, path: Path) -> dict[str, Any]:
    try:
        return check_metadata(json.loads(text), source=str(path))
    except (TypeError, ValueError, RecursionError) as error:  # an InputError is a ValueError, and says more
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: {ADAPTER_KEY} is no JSON text ({type(error).__name__}).") from error


def _adapter(metadata: Mapping[str, Any], weights: Mapping[str, Tensor], *, source: str) -> Adapter:
    try:
        return adapter_from_metadata(metadata, weights, source=source)
    except InputError:
        raise
    except Exception as error:  # torch raises many kinds for shapes that do not belong together
        raise InputError(f"{source}: its matrices do not belong together ({type(error).__name__}).") from error


def _peft_name(layer: str, matrix: str) -> str:
    return f"{_PEFT_PREFIX}{layer}.lora_{matrix[-1].upper()}.weight"


def _unscaled(weights: Mapping[str, Tensor], alpha: float, metadata: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights with the scale taken out of B again."""
    scale = lora_scale(settings_from_metadata(metadata))
    return {
        name: weight * (alpha / max(1, weight.shape[1]) / scale) if ".lora_B." in name else weight
        for name, weight in weights.items()
    }
