"""LoRA config: what adapter_config.json may say, because fused layers can compute it.

    r, lora_alpha, rank_pattern, alpha_pattern, use_rslora                        -> rank and scale of each layer
    target_modules, exclude_modules, layers_to_transform, layers_pattern          -> which layers have weights
    task_type, lora_dropout, ...                          no effect on a trained adapter
    any other key                                         must be unset, or an error names it

A key of a later PEFT is refused unless it is unset: it could change what the weights mean.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from lit_phi2.errors import InputError
from lit_phi2.model.lora import QKV_PROJECTIONS
from lit_phi2.utils.json_objects import (
    OBJECT,
    TEXT,
    TEXTS,
    Kind,
    check_values,
    describe,
    integer,
    nullable,
    number,
    one_of,
)

MAX_RANK, MAX_ALPHA = 2**16, 2**31 - 1
_RANK, _ALPHA = integer(1, MAX_RANK), number(-MAX_ALPHA, MAX_ALPHA)
_MAX_PATTERNS = 2**12
# What target_modules: all-linear stands for; the last two are those of Phi-2's original code.
ALL_LINEAR = (*QKV_PROJECTIONS, "dense", "fc1", "fc2", "Wqkv", "out_proj")
_HOW_TO_MERGE = "Merge it into its base in PEFT (merge_and_unload), and give the result as model.base."


def _text_or(kind: Kind) -> Kind:
    return Kind(f"a text, or {kind.description}", lambda value: isinstance(value, str) or kind.matches(value))


_LIST_OF_TEXTS = Kind("a list of texts", lambda value: value == [] or TEXTS.matches(value))
_BLOCKS = Kind(
    "an integer or a list of integers, not negative",
    lambda value: all(
        type(item) is int and 0 <= item < 2**31 for item in (value if isinstance(value, list) else [value])
    ),
)
_REQUIRED = {
    "peft_type": one_of("LORA"),
    "r": _RANK,
    "lora_alpha": _ALPHA,
    "target_modules": _text_or(TEXTS),
}
_CHECKED = {
    "base_model_name_or_path": nullable(TEXT),
    # These only fill A and B before training. The others change the base's weights, or are LoRA variants.
    "init_lora_weights": one_of(True, False, "gaussian", "orthogonal"),
    "use_rslora": nullable(one_of(True, False)),
    "rank_pattern": nullable(OBJECT),
    "alpha_pattern": nullable(OBJECT),
    "exclude_modules": nullable(_text_or(_LIST_OF_TEXTS)),
    "layers_to_transform": nullable(_BLOCKS),
    "layers_pattern": nullable(_text_or(_LIST_OF_TEXTS)),
}
_HARMLESS = {"task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout"}


@dataclass(frozen=True, slots=True)
class PeftSettings:
    """What adapter_config.json says about the update of each layer.

    Attributes:
        r: rank of a layer that no pattern names.
        lora_alpha: of a layer that no pattern names.
        target_modules: ends of the names of the layers, or a regular expression that whole names match.
        rank_pattern: name of a layer, or a regular expression that its end matches -> rank.
        alpha_pattern: the same for alpha.
        use_rslora: whether the scale is alpha / sqrt(rank).
        exclude_modules: layers that target_modules names and that have no adapter, given in the same two ways.
        layers_to_transform: blocks that have an adapter; None for all.
        layers_pattern: names of the list of blocks; empty for any.
    """

    r: int
    lora_alpha: float
    target_modules: tuple[str, ...] | str
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    exclude_modules: tuple[str, ...] | str = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()

    def selects(self, layer: str) -> bool:
        """Whether PEFT gives the layer with this name an adapter."""
        return bool(check_target_module_exists(self, layer))  # it reads the four settings above by name

    def rank(self, layer: str) -> int:
        """Of the layer with this name in transformers' Phi."""
        return self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), layer), self.r)

    def alpha(self, layer: str) -> float:
        """Of the layer with this name in transformers' Phi."""
        return self.alpha_pattern.get(get_pattern_key(list(self.alpha_pattern), layer), self.lora_alpha)

    def scale(self, layer: str) -> Fraction:
        """What B A is multiplied by: alpha / r, or alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732)."""
        alpha, rank = self.alpha(layer), self.rank(layer)
        return Fraction(alpha / math.sqrt(rank)) if self.use_rslora else Fraction(alpha) / rank

    def fused_targets(self, layers: Iterable[str]) -> tuple[str, ...]:
        """The kinds of some fused layers, in the order of target_modules where that is a list.

        >>> settings = PeftSettings(4, 8, ("fc1", "q_proj", "v_proj"), {}, {}, False)
        >>> settings.fused_targets(["model.layers.0.self_attn.Wqkv", "model.layers.0.mlp.fc1"])
        ('fc1', 'Wqkv')
        """
        fused = {**dict.fromkeys(QKV_PROJECTIONS, "Wqkv"), "out_proj": "dense"}  # the original code's out_proj
        listed = [] if isinstance(self.target_modules, str) else self.target_modules
        order = [fused.get(name, name) for name in (target.rpartition(".")[2] for target in listed)]
        present = {layer.rpartition(".")[2] for layer in layers}
        return tuple(name for name in dict.fromkeys([*order, *sorted(present)]) if name in present)


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
            raise InputError(
                f"{source}: {key} is {describe(value)}; {expected}, because others change the weights. {_HOW_TO_MERGE}"
            )
    blocks = config.get("layers_to_transform")
    if isinstance(config["target_modules"], str) and blocks is not None:  # PEFT refuses it, too
        raise InputError(f"{source}: layers_to_transform has no effect where target_modules is a text.")
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for pattern in patterns:
        _check_regex(pattern, "layers_pattern", source)
    return PeftSettings(
        r=config["r"],
        lora_alpha=config["lora_alpha"],
        target_modules=_read_names(config, "target_modules", source),
        rank_pattern=_read_pattern(config, "rank_pattern", _RANK, source),
        alpha_pattern=_read_pattern(config, "alpha_pattern", _ALPHA, source),
        use_rslora=bool(config.get("use_rslora")),
        exclude_modules=_read_names(config, "exclude_modules", source),
        layers_to_transform=(blocks,) if isinstance(blocks, int) else tuple(blocks or ()) or None,
        layers_pattern=tuple(patterns),
    )


def _read_names(config: Mapping[str, Any], key: str, source: str) -> tuple[str, ...] | str:
    """Ends of names of layers, or a regular expression."""
    names = config.get(key) or ()
    if key == "target_modules" and isinstance(names, str) and names.lower() == "all-linear":
        return ALL_LINEAR
    if isinstance(names, str):
        _check_regex(names, key, source)
        return names
    _check_count(names, key, source)
    return tuple(dict.fromkeys(names))


def _check_count(names: Sized, key: str, source: str) -> None:
    if len(names) > _MAX_PATTERNS:
        raise InputError(f"{source}: {key} has {len(names)} names; expected at most {_MAX_PATTERNS}.")


def _read_pattern(config: Mapping[str, Any], key: str, kind: Kind, source: str) -> dict[str, Any]:
    pattern = config.get(key) or {}
    check_values(pattern, dict.fromkeys(pattern, kind), source=f"{source}: {key}")
    _check_count(pattern, key, source)
    for name in pattern:
        _check_regex(name, key, source)
    return dict(pattern)


def _check_regex(name: str, key: str, source: str) -> None:
    if not _is_simple_regex(name):
        raise InputError(
            f"{source}: {key} names {name[:80]!r}; expected the name of a layer, or a regular expression of letters, "
            f"'.', '|', groups and at most two of '*' and '+', since others can take years to match. {_HOW_TO_MERGE}"
        )


def _is_simple_regex(name: str) -> bool:
    r"""Whether a regular expression is sure to be matched at once: (a+)+ of a hostile file would take years.

    >>> [_is_simple_regex(name) for name in ("fc1", r"layers\.\d+\.mlp\.fc1", "(?:q|k)_proj", "(a+)+", "((")]
    [True, True, True, False, False]
    """
    name = name.replace("(?:", "(")
    repeats, choices = len(re.findall(r"[*+]", name)), name.count("|")
    few = choices <= 8 or (name.count("(") <= 3 and choices <= (16 if repeats else 64))
    if repeats > 2 or not few or len(name) > 300:
        return False
    if not re.fullmatch(r"[\w.^$|()\\*+\[\]-]+", name) or re.search(r"[)*+][*+]", name):
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
