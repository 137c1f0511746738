"""LoRA config: what adapter_config.json may say, because fused layers can compute it.

    r, lora_alpha, target_modules, rank_pattern, alpha_pattern, use_rslora  -> PeftSettings
    task_type, lora_dropout, ...                                            -> no effect on a trained adapter
    any other key                                                           -> must be unset, or an error names it

A key of a later PEFT is refused unless it is unset: it could change what the weights mean.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key

from lit_phi2.errors import InputError
from lit_phi2.model.lora import QKV_PROJECTIONS
from lit_phi2.utils.json_objects import OBJECT, TEXT, TEXTS, Kind, check_values, describe, integer, nullable, one_of

MAX_RANK, MAX_ALPHA = 2**16, 2**31 - 1
_RANK = integer(1, MAX_RANK)
_WHOLE_ALPHA = Kind(
    f"a whole number from 1 to {MAX_ALPHA}",
    lambda value: type(value) in (int, float) and 1 <= value <= MAX_ALPHA and value == int(value),
)
_MAX_PATTERNS = 2**12
_REQUIRED = {
    "peft_type": one_of("LORA"),
    "r": _RANK,
    "lora_alpha": _WHOLE_ALPHA,
    "target_modules": TEXTS,
}
_CHECKED = {
    "base_model_name_or_path": nullable(TEXT),
    # These only fill A and B before training. The others change the base's weights, or are LoRA variants.
    "init_lora_weights": one_of(True, False, "gaussian", "orthogonal"),
    "use_rslora": nullable(one_of(True, False)),
    "rank_pattern": nullable(OBJECT),
    "alpha_pattern": nullable(OBJECT),
}
_HARMLESS = {"task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout"}


@dataclass(frozen=True, slots=True)
class PeftSettings:
    """What adapter_config.json says about the update of each layer.

    Attributes:
        r: rank of a layer that no pattern names.
        lora_alpha: of a layer that no pattern names.
        target_modules: last parts of the names of the layers, as transformers has them.
        rank_pattern: name of a layer, or a regular expression that its end matches -> rank.
        alpha_pattern: the same for alpha.
        use_rslora: whether the scale is alpha / sqrt(rank).
    """

    r: int
    lora_alpha: int
    target_modules: tuple[str, ...]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, int]
    use_rslora: bool

    def rank(self, layer: str) -> int:
        """Of the layer with this name in transformers' Phi."""
        return self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), layer), self.r)

    def alpha(self, layer: str) -> int:
        """Of the layer with this name in transformers' Phi."""
        return int(self.alpha_pattern.get(get_pattern_key(list(self.alpha_pattern), layer), self.lora_alpha))

    def scale(self, layer: str) -> Fraction:
        """What B A is multiplied by: alpha / r, or alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732)."""
        alpha, rank = self.alpha(layer), self.rank(layer)
        return Fraction(alpha / math.sqrt(rank)) if self.use_rslora else Fraction(alpha, rank)

    def fused_targets(self) -> tuple[str, ...]:
        """[q_proj, k_proj, v_proj, fc1] -> (Wqkv, fc1), in this order; Wqkv too where only some of the three are."""
        fused = {**dict.fromkeys(QKV_PROJECTIONS, "Wqkv"), "out_proj": "dense"}  # the original code's out_proj
        return tuple(dict.fromkeys(fused.get(name, name) for name in self.target_modules))


def read_peft_settings(config: Mapping[str, Any], *, source: str) -> PeftSettings:
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
    return PeftSettings(
        r=config["r"],
        lora_alpha=int(config["lora_alpha"]),
        target_modules=tuple(dict.fromkeys(map(_short_name, config["target_modules"]))),
        rank_pattern=_read_pattern(config, "rank_pattern", _RANK, source),
        alpha_pattern=_read_pattern(config, "alpha_pattern", _WHOLE_ALPHA, source),
        use_rslora=bool(config.get("use_rslora")),
    )


def _short_name(target: str) -> str:
    """mlp.fc1 -> fc1; the name of a layer of one block is left as it is, and refused later."""
    return re.sub(r"^(self_attn|mixer|mlp)\.", "", target)


def _read_pattern(config: Mapping[str, Any], key: str, kind: Kind, source: str) -> dict[str, int]:
    pattern = config.get(key) or {}
    check_values(pattern, dict.fromkeys(pattern, kind), source=f"{source}: {key}")
    if len(pattern) > _MAX_PATTERNS:
        raise InputError(f"{source}: {key} has {len(pattern)} names; expected at most {_MAX_PATTERNS}.")
    for name in pattern:
        if not _is_simple_regex(name):
            raise InputError(
                f"{source}: {key} names {name[:80]!r}; expected the name of a layer, or a simple regular expression."
            )
    return dict(pattern)


def _is_simple_regex(name: str) -> bool:
    r"""Whether a regular expression is sure to be matched at once: (a+)+ of a hostile file would take years.

    >>> [_is_simple_regex(name) for name in ("fc1", r"layers\.\d+\.mlp\.fc1", "(q|k)_proj", "(a+)+", "((")]
    [True, True, True, False, False]
    """
    few = len(name) <= 200 and len(re.findall(r"[*+]", name)) <= 2 and name.count("|") <= 8
    if not few or not re.fullmatch(r"[\w.^$|()\\*+\[\]-]+", name) or re.search(r"[)*+][*+]", name):
        return False
    try:
        re.compile(f"({name})")
    except re.error:
        return False
    return True


def hf_targets(targets: tuple[str, ...]) -> list[str]:
    """(Wqkv, fc1) -> [q_proj, k_proj, v_proj, fc1], in this order."""
    return [name for target in targets for name in (QKV_PROJECTIONS if target == "Wqkv" else (target,))]


def _is_unset(value: Any) -> bool:
    """null, false, or an empty text or list; 0 is a value (of layers_to_transform, a layer)."""
    return value is None or value is False or (isinstance(value, str | list) and not value)
