"""Base: what the module checks before it loads anything, and the loaded base with an adapter in its layers.

names in the config  ->  CheckedBase: files, sizes, initial adapter  ->  PeftModel in the compute dtype
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lit_phi2.adapters.adapter import Adapter, check_adapter
from lit_phi2.adapters.checkpoint import read_adapter
from lit_phi2.model.loading import check_weights, linear_layers, load_phi2, num_parameters
from lit_phi2.model.lora import (
    LoraSettings,
    PeftModel,
    add_lora,
    check_targets,
    load_adapter_state_dict,
    trainable_parameters,
)
from lit_phi2.model.phi2 import FusedPhiForCausalLM
from lit_phi2.pretrained import BaseModel, resolve_base_model

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CheckedBase:
    """A base that the adapter settings fit.

    Attributes:
        model: its files.
        num_layers: blocks.
        num_parameters: without the adapter.
        adapter: whose weights the run starts from; None starts from the base.
        adapter_source: where it comes from, for messages.
    """

    model: BaseModel
    num_layers: int
    num_parameters: int
    adapter: Adapter | None
    adapter_source: str


def check_base(base: str, settings: LoraSettings, adapter: str | None) -> CheckedBase:
    """Find the base, and compare targets and initial adapter with it, without loading its weights.

    Raises:
        InputError: the base, a target or the initial adapter cannot be used.
    """
    model = resolve_base_model(base)
    check_weights(model)
    layers = linear_layers(model)
    num_layers = max(layers.values())
    check_targets(settings.target_modules, layers, num_layers)
    initial = None
    if adapter is not None:
        initial = read_adapter(Path(adapter))
        initial = check_adapter(initial, settings, model, source=adapter)
    return CheckedBase(model, num_layers, num_parameters(model), initial, adapter or "")


def load_base(
    checked: CheckedBase,
    settings: LoraSettings,
    dtype: torch.dtype,
    *,
    dropout: float,
    calibrate: Callable[[FusedPhiForCausalLM], None] | None = None,
) -> PeftModel:
    """Load the base, freeze it and add the adapter, in train mode.

    Args:
        checked: from check_base.
        settings: of the adapter.
        dtype: of the frozen weights.
        dropout: on the input of LoRA's update.
        calibrate: gets the base, its weights in int8, before the adapter is added; None for a base in dtype.
    """
    base = load_phi2(checked.model, dtype, quantize=calibrate is not None)
    if calibrate is not None:
        calibrate(base)
    phi = add_lora(base, settings, dropout=dropout)
    if checked.adapter is not None:
        load_adapter_state_dict(phi, checked.adapter.weights, source=checked.adapter_source)
    # from_pretrained returns eval mode and Lightning keeps the modes it finds, so without this the base's own
    # dropout, part of Phi-2's recipe, would be off.
    phi.train()
    trained = sum(parameter.numel() for parameter in trainable_parameters(phi).values())
    total = sum(parameter.numel() for parameter in phi.parameters())
    log.info(
        "base %s, %d layers; LoRA r=%d on %s trains %s, %s are frozen",
        checked.model.name,
        checked.num_layers,
        settings.lora_r,
        ", ".join(settings.target_modules),
        f"{trained:,} of {total:,} parameters ({100 * trained / total:.2f} %)",
        f"{total - trained:,}",
    )
    return phi
