"""Adapter: the value that training produces, and whether it can be used with a base.

    base, settings, weights  ->  Adapter  ->  a checkpoint (checkpoint.py) or a folder in PEFT form (peft_format.py)

Inside a run the weights name `Wqkv`; on disk in PEFT form they name q_proj, k_proj and v_proj.
"""

from dataclasses import dataclass

from torch import Tensor

from lit_phi2.data.prompts import TEMPLATE_VERSION
from lit_phi2.errors import InputError
from lit_phi2.model.lora import LoraSettings
from lit_phi2.pretrained import BaseModel


@dataclass(frozen=True, slots=True)
class Adapter:
    """A trained adapter and what it was trained on.

    Attributes:
        weights: float32, by PEFT's names, with Wqkv fused.
        settings: rank, alpha and targets.
        base: base, base_revision and base_digest; the digest is empty where it is unknown.
        template_version: of the prompts it was trained on; 0 where it is unknown.
    """

    weights: dict[str, Tensor]
    settings: LoraSettings
    base: dict[str, str]
    template_version: int


def make_adapter(base: BaseModel, settings: LoraSettings, weights: dict[str, Tensor]) -> Adapter:
    """An adapter trained on this base with the present template."""
    return Adapter(weights, settings, base.fingerprint(), TEMPLATE_VERSION)


def check_adapter(adapter: Adapter, settings: LoraSettings, base: BaseModel, *, source: str) -> None:
    """Refuse an adapter whose settings, base or template differ from the run's.

    Raises:
        InputError: names the first difference, with both values.
    """
    for name in ("lora_r", "lora_alpha", "target_modules"):
        value, expected = getattr(adapter.settings, name), getattr(settings, name)
        if value != expected and (name != "target_modules" or set(value) != set(expected)):
            raise InputError(f"{source}: has {name} {value}, but model.{name} is {expected}; make them equal.")
    digest = adapter.base["base_digest"]
    if digest and digest != base.digest:
        raise InputError(
            f"{source}: was trained on {adapter.base['base']!r} (digest {digest}), but model.base is {base.name!r} "
            f"(digest {base.digest}). Give its own base with --model.base."
        )
    if adapter.template_version not in (0, TEMPLATE_VERSION):
        raise InputError(
            f"{source}: was trained on prompts of template {adapter.template_version}; this lit_phi2 has "
            f"{TEMPLATE_VERSION}."
        )
