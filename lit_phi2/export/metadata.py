"""Metadata: what an exported adapter says about itself, so that it can be imported again.

    Adapter  ->  base, base_revision, base_digest, lora_r, lora_alpha, target_modules, use_rslora, ...

It is one JSON object: a key of a GGUF file, and a key of an MLX adapter's config.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lit_phi2.adapters.adapter import Adapter
from lit_phi2.adapters.peft_format import merge_qkv, split_qkv
from lit_phi2.errors import InputError
from lit_phi2.model.lora import LoraSettings
from lit_phi2.utils.files import tree_digest
from lit_phi2.utils.json_objects import TEXT, TEXTS, check_values, describe, integer, one_of

_BASE_KEYS = ("base", "base_revision", "base_digest")
_POSITIVE = integer(1, 2**31 - 1)
_METADATA = {
    **dict.fromkeys(_BASE_KEYS, TEXT),
    "lora_r": _POSITIVE,
    "lora_alpha": _POSITIVE,
    "target_modules": TEXTS,
    "use_rslora": one_of(True, False),
    "template_version": integer(0, 2**31 - 1),
    "template_digest": TEXT,
    "num_layers": _POSITIVE,
    "weights_digest": TEXT,
}
_LATER = {"use_rslora", "template_digest"}  # older exports have none


def lora_scale(settings: LoraSettings) -> float:
    """What B A is multiplied by; alpha / rank, or alpha / sqrt(rank) with use_rslora."""
    return settings.scale


def adapter_digest(adapter: Adapter) -> str:
    """SHA-256 of the weights by the names that plain PEFT gives them; lit_phi2.json has the same one."""
    return tree_digest(dict(sorted(split_qkv(adapter.weights).items())))


def adapter_metadata(adapter: Adapter, num_layers: int) -> dict[str, Any]:
    """Everything in an adapter except its weights, as JSON has it."""
    settings = adapter.settings
    return {
        **adapter.base,
        "lora_r": settings.lora_r,
        "lora_alpha": settings.lora_alpha,
        "target_modules": list(settings.target_modules),
        "use_rslora": settings.use_rslora,
        "template_version": adapter.template_version,
        "template_digest": adapter.template_digest,
        "num_layers": num_layers,
        "weights_digest": adapter_digest(adapter),
    }


def check_metadata(values: Any, *, source: str) -> dict[str, Any]:
    """The metadata, if adapter_metadata wrote it.

    Raises:
        InputError: a key is missing or of another kind.
    """
    if not isinstance(values, dict):
        raise InputError(f"{source}: its lit_phi2 metadata is {describe(values)}; expected an object.")
    check_values(values, _METADATA, source=f"{source}: lit_phi2 metadata", required=_METADATA.keys() - _LATER)
    return values


def settings_from_metadata(metadata: Mapping[str, Any]) -> LoraSettings:
    """The settings in checked metadata."""
    targets = tuple(metadata["target_modules"])
    return LoraSettings(metadata["lora_r"], metadata["lora_alpha"], targets, metadata.get("use_rslora", False))


def adapter_from_metadata(metadata: Mapping[str, Any], hf_weights: Mapping[str, Tensor], *, source: str) -> Adapter:
    """The adapter of checked metadata and its weights by PEFT's names, with q, k and v apart.

    Raises:
        InputError: the weights are not those that were exported. Where the scale is no power of two, a GGUF file
            holds them rounded, and their digest tells nothing.
    """
    settings = settings_from_metadata(metadata)
    adapter = Adapter(
        weights=merge_qkv(hf_weights, source=source),
        settings=settings,
        base={key: metadata[key] for key in _BASE_KEYS},
        template_version=metadata["template_version"],
        template_digest=metadata.get("template_digest", ""),
    )
    if _is_power_of_two(lora_scale(settings)):
        digest = adapter_digest(adapter)
        if digest != metadata["weights_digest"]:
            raise InputError(
                f"{source}: is damaged: the digest of its weights is {digest[:16]}, but "
                f"{metadata['weights_digest'][:16]} was written. Export the adapter again."
            )
    return adapter


def _is_power_of_two(value: float) -> bool:
    return math.frexp(value)[0] == 0.5
