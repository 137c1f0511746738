"""LoRA config: what adapter_config.json may say, because the fused layer computes it.

    r, lora_alpha, target_modules   -> LoraSettings
    task_type, lora_dropout, ...    -> no effect on a trained adapter
    any other key                   -> must be unset, or an error names it

A key of a later PEFT is refused unless it is unset: it could change what the weights mean.
"""

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig

from lit_phi2.errors import InputError
from lit_phi2.model.lora import QKV_PROJECTIONS, LoraSettings
from lit_phi2.utils.json_objects import TEXT, TEXTS, Kind, check_values, describe, integer, nullable, one_of

_MAX_RANK, _MAX_ALPHA = 2**16, 2**31 - 1
_WHOLE_ALPHA = Kind(
    f"a whole number from 1 to {_MAX_ALPHA}",
    lambda value: type(value) in (int, float) and 1 <= value <= _MAX_ALPHA and value == int(value),
)
_REQUIRED = {
    "peft_type": one_of("LORA"),
    "r": integer(1, _MAX_RANK),
    "lora_alpha": _WHOLE_ALPHA,
    "target_modules": TEXTS,
}
_CHECKED = {
    "base_model_name_or_path": nullable(TEXT),
    # These only fill A and B before training. The others change the base's weights, or are LoRA variants.
    "init_lora_weights": one_of(True, False, "gaussian", "orthogonal"),
}
_HARMLESS = {"task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout"}


def read_lora_settings(config: Mapping[str, Any], *, source: str) -> LoraSettings:
    """The settings of an adapter from the content of its adapter_config.json.

    Args:
        config: the content.
        source: the file, for messages.

    Raises:
        InputError: names the first key that is absent, of another kind, or of another meaning than plain LoRA's.
    """
    check_values(config, _REQUIRED | _CHECKED, source=source, required=_REQUIRED)
    defaults = LoraConfig().to_dict()
    for key, value in config.items():
        if key in _REQUIRED or key in _CHECKED or key in _HARMLESS or _is_unset(value):
            continue
        default = defaults.get(key, {})  # an empty object turns some of the known settings on
        if type(value) is not type(default) or value != default:
            expected = f"expected {describe(default)}, plain LoRA's" if key in defaults else "this key is unknown here"
            raise InputError(f"{source}: {key} is {describe(value)}; {expected}, because others change the weights.")
    return LoraSettings(config["r"], int(config["lora_alpha"]), fused_targets(config["target_modules"], source=source))


def fused_targets(hf_targets: list[str], *, source: str) -> tuple[str, ...]:
    """[q_proj, k_proj, v_proj, fc1] -> (Wqkv, fc1), in this order.

    Raises:
        InputError: some of q, k and v are adapted, but not all.
    """
    named = [target for target in QKV_PROJECTIONS if target in hf_targets]
    if len(named) not in (0, len(QKV_PROJECTIONS)):
        raise InputError(
            f"{source}: target_modules names {' and '.join(named)} alone; a fused Wqkv needs q_proj, k_proj and v_proj."
        )
    return tuple(dict.fromkeys("Wqkv" if target in QKV_PROJECTIONS else target for target in hf_targets))


def hf_targets(targets: tuple[str, ...]) -> list[str]:
    """The inverse of fused_targets."""
    return [name for target in targets for name in (QKV_PROJECTIONS if target == "Wqkv" else (target,))]


def _is_unset(value: Any) -> bool:
    """null, false, or an empty text or list; 0 is a value (of layers_to_transform, a layer)."""
    return value is None or value is False or (isinstance(value, str | list) and not value)
