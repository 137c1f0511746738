"""Adapter: the value that training produces, and whether it can be used with a base.

    base, settings, weights  ->  Adapter  ->  a checkpoint (checkpoint.py) or a folder in PEFT form (peft_format.py)

Inside a run the weights name `Wqkv`; on disk in PEFT form they name q_proj, k_proj and v_proj.

What an adapter says about its base is only compared with the base that the config names: nothing is looked up or
fetched by it.
"""

import functools
import logging
import shlex
import zlib
from dataclasses import dataclass, replace
from pathlib import PurePath

import torch
from torch import Tensor

from lit_phi2.base_digest import different_parts
from lit_phi2.data.prompts import TEMPLATE_DIGEST, TEMPLATE_VERSION
from lit_phi2.errors import InputError
from lit_phi2.model.calibration import QuantizationTable
from lit_phi2.model.loading import empty_phi2, linear_layers
from lit_phi2.model.lora import (
    LoraSettings,
    PeftModel,
    add_lora,
    check_adapter_state_dict,
    check_targets,
    trainable_parameters,
)
from lit_phi2.pretrained import BaseModel

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A trained adapter and what it was trained on.

    Attributes:
        weights: float32, by PEFT's names, with Wqkv fused.
        settings: rank, alpha, targets and kind of scale.
        base: base, base_revision and base_digest; the digest is empty where it is unknown.
        template_version: of the prompts it was trained on; 0 where it is unknown.
        template_digest: of these prompts; empty where it is unknown.
        quantization: how the base's layers were multiplied in 8 bits (`model/calibration.py`); None in 16 or 32 bits.
        is_partial: another tool trained it in some layers only; `check_adapter` adds the others, which change nothing.
    """

    weights: dict[str, Tensor]
    settings: LoraSettings
    base: dict[str, str]
    template_version: int
    template_digest: str = ""
    quantization: QuantizationTable | None = None
    is_partial: bool = False


def make_adapter(base: BaseModel, settings: LoraSettings, weights: dict[str, Tensor]) -> Adapter:
    """An adapter trained on this base with the present template."""
    return Adapter(weights, settings, base.fingerprint(), TEMPLATE_VERSION, TEMPLATE_DIGEST)


def with_base_name(adapter: Adapter, base: BaseModel) -> Adapter:
    """The adapter as it leaves: it names the base that it was checked with; an unknown digest stays unknown."""
    named = {**base.fingerprint(), "base": base.public_name, "base_digest": adapter.base["base_digest"]}
    return replace(adapter, base=named)


def check_adapter(adapter: Adapter, settings: LoraSettings, base: BaseModel, *, source: str) -> Adapter:
    """Refuse an adapter whose base, settings, template or weights differ from the run's.

    Returns:
        The adapter; if it is partial, with an update of zero for every layer that it lacks.

    Raises:
        InputError: names the first difference, with both values.
    """
    check_same_base(adapter, base, source=source)
    for name in ("lora_r", "lora_alpha", "use_rslora", "target_modules"):
        value, expected = getattr(adapter.settings, name), getattr(settings, name)
        if value != expected and (name != "target_modules" or set(value) != set(expected)):
            raise InputError(f"{source}: has {name} {value}, but model.{name} is {expected}; make them equal.")
    if adapter.template_version not in (0, TEMPLATE_VERSION):
        raise InputError(
            f"{source}: was trained on prompts of template {adapter.template_version}; this lit_phi2 has "
            f"{TEMPLATE_VERSION}."
        )
    if adapter.template_digest not in ("", TEMPLATE_DIGEST):
        raise InputError(
            f"{source}: was trained on the prompt template with digest {adapter.template_digest}; this lit_phi2 has "
            f"{TEMPLATE_DIGEST}: data/prompts.py was changed. Restore it, or train again."
        )
    layers = linear_layers(base)
    check_targets(adapter.settings.target_modules, layers, max(layers.values()))
    with torch.device("meta"):
        phi = add_lora(empty_phi2(base), adapter.settings, dropout=0.0)
    if adapter.is_partial:
        adapter = _completed(adapter, phi, source)
    check_adapter_state_dict(phi, adapter.weights, source=source)
    return adapter


def _completed(adapter: Adapter, phi: PeftModel, source: str) -> Adapter:
    """The adapter with new weights, whose B is zero, for every layer that it lacks."""
    parameters = trainable_parameters(phi)
    missing = {name: tuple(parameter.shape) for name, parameter in parameters.items() if name not in adapter.weights}
    weights = dict(adapter.weights)
    for name, (rows, columns) in missing.items():
        layer, _, matrix = name.removesuffix(".weight").rpartition(".")
        weights[name] = new_lora_a(layer, rows, columns) if matrix == "lora_A" else torch.zeros(rows, columns)
    if missing:
        _log_partial(source, (len(parameters) - len(missing)) // 2, len(parameters) // 2)
    return replace(adapter, weights=weights, is_partial=False)


def new_lora_a(layer: str, num_rows: int, width: int) -> Tensor:
    """Rows of A as a new adapter has them, since A = B = 0 would never learn; the same whenever a layer is read."""
    generator = torch.Generator().manual_seed(zlib.crc32(layer.encode()))
    bound = width**-0.5  # PEFT's: kaiming_uniform_(A, a=sqrt(5))
    return torch.empty(num_rows, width).uniform_(-bound, bound, generator=generator)


def check_same_base(adapter: Adapter, base: BaseModel, *, source: str) -> None:
    """Refuse an adapter that was trained on another base; warn if nothing tells which one.

    Raises:
        InputError: the digests differ; names both bases with their digests, and what to change.
    """
    name, digest = adapter.base["base"], adapter.base["base_digest"]
    if not digest:
        _warn_unverified(source, name, base.name)
    elif digest != base.digest:
        parts = " and ".join(different_parts(digest, base.digest))
        cure = f"Give its own base: --model.base {shlex.quote(name)}."
        if not adapter.base["base_revision"] and name != "tiny" and not PurePath(name).is_absolute():
            cure = f"Give its own base as --model.base: a folder that was named {name!r}."  # an export keeps no path
        elif name == base.name:
            cure = f"The {parts} of this base changed since then. Restore them, or train again."
        raise InputError(
            f"{source}: was trained on {name!r} (digest {digest}), but model.base is {base.name!r} (digest "
            f"{base.digest}); they differ in {parts}. {cure}"
        )


@functools.cache  # once: model, training and export check the same adapter
def _log_partial(source: str, num_layers: int, num_all: int) -> None:
    log.info("%s: adapts %d of the %d layers of these kinds; the others do not change", source, num_layers, num_all)


@functools.cache  # once: settings, model and training check the same adapter
def _warn_unverified(source: str, name: str, base_name: str) -> None:
    log.warning(
        "%s: nothing shows which base it was trained on (it names %r); model.base %r is used", source, name, base_name
    )
