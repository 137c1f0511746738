"""Fuse: plain LoRA of transformers' Phi, layer by layer, as LoRA of the fused layers, of one rank and one scale.

    q_proj  A1 (r, D), B1 (D, r)              [A1]            [B1  0  0]
    k_proj  A2 (r, D), B2 (D, r)  ->  Wqkv  A [A2]  (3 r, D)  B [ 0 B2  0]  (3 D, 3 r)
    v_proj  A3 (r, D), B3 (D, r)              [A3]            [ 0  0 B3]

    of smaller rank than the largest      ->  A gets random rows, B gets columns of zeros
    scales differ, or no whole alpha      ->  the scale goes into B, and alpha = r
    use_rslora with all ranks equal       ->  kept
    only some blocks or layers            ->  is_partial: `check_adapter`, which knows the base, adds the others

Layers that have the names of Phi-2's original code get transformers' (`original_code.py`).

Nothing is computed except B times its scale, so the update is the same to one rounding. q, k and v that share their A,
as a fused layer's export does, keep their rank.

Training may start from the result: of a pair A, B at least one is not zero in every rank, as in a new adapter, so each
rank learns. The zeros beside B1, B2 and B3 learn too: the three updates do not stay apart.
"""

import functools
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from lit_phi2.adapters.adapter import new_lora_a
from lit_phi2.adapters.lora_config import MAX_ALPHA, PeftSettings
from lit_phi2.errors import InputError
from lit_phi2.model.lora import QKV_PROJECTIONS, LoraSettings
from lit_phi2.original_code import convert_name
from lit_phi2.utils.paths import ADAPTER_CONFIG_FILE

log = logging.getLogger(__name__)

_PREFIX, _LORA_A, _LORA_B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_MAX_PADDING = 256  # a hostile file must not make its reader allocate more than this times its size
# The linear layers of a block, as transformers and as Phi-2's original code name them.
_BLOCK_LAYERS = {
    "model.layers": (*(f"self_attn.{name}" for name in (*QKV_PROJECTIONS, "dense")), "mlp.fc1", "mlp.fc2"),
    "transformer.h": ("mixer.Wqkv", "mixer.out_proj", "mlp.fc1", "mlp.fc2"),
}
_MAX_BLOCKS = 2**10  # as many as a base may have (base_config.py)


@dataclass(frozen=True, slots=True)
class _Update:
    """What LoRA adds to a layer's weight, scale B A; a is (r, in), b is (out, r)."""

    a: Tensor
    b: Tensor
    scale: Fraction


@dataclass(frozen=True, slots=True)
class FusedAdapter:
    """What `fuse_adapter` returns: settings, weights and is_partial of an Adapter."""

    settings: LoraSettings
    weights: dict[str, Tensor]
    is_partial: bool


def fuse_adapter(weights: Mapping[str, Tensor], peft: PeftSettings, *, source: str) -> FusedAdapter:
    """Settings and weights of the fused layers, from the weights of an adapter by the names that PEFT gives them.

    Weights that are no A or B are returned as they are, for `check_adapter` to name.

    Args:
        weights: of the whole adapter.
        peft: what its adapter_config.json says.
        source: its folder, for messages.

    Raises:
        InputError: a matrix has no partner, is of another rank than adapter_config.json says, or of a layer that it
            does not select; or a layer that it selects has no weights.
    """
    layers = [name.removesuffix(_LORA_A) for name in weights if name.endswith(_LORA_A)]
    if not layers:
        raise InputError(f"{source}: has no weights of LoRA, whose names end with {_LORA_A}.")
    _check_selection([layer.removeprefix(_PREFIX) for layer in layers], peft, source)
    updates = {_hf_layer(layer): _read_update(weights, layer, peft, source) for layer in layers}
    if len(updates) < len(layers):
        raise InputError(f"{source}: names a layer twice, as transformers and as Phi-2's original code name it.")
    paired = {layer + suffix for layer in layers for suffix in (_LORA_A, _LORA_B)}
    fused = _fuse_qkv(updates, source)
    settings, fused = _equalize(fused, peft, source=source)
    result = {name: weight for name, weight in weights.items() if name not in paired}
    for layer, update in fused.items():
        result |= {layer + _LORA_A: update.a, layer + _LORA_B: update.b}
    return FusedAdapter(settings, result, _is_partial(fused, peft))


def _check_selection(layers: Sequence[str], peft: PeftSettings, source: str) -> None:
    """Compare the layers that have weights with those that PEFT gives an adapter.

    PEFT itself only warns: it drops the weights of other layers, and starts anew those that have none.
    """
    config_file, present = f"{source}/{ADAPTER_CONFIG_FILE}", set(layers)
    for layer in layers:
        if not peft.selects(layer):
            raise InputError(
                f"{config_file}: target_modules and its exceptions do not select {layer!r}, but there is a weight "
                f"{_PREFIX + layer + _LORA_A!r}."
            )
    for blocks, names in _BLOCK_LAYERS.items():
        for layer in (f"{blocks}.{number}.{name}" for number in range(_num_blocks(layers, blocks)) for name in names):
            if layer not in present and peft.selects(layer):
                raise InputError(
                    f"{config_file}: target_modules selects {layer!r}, but the adapter has no weight "
                    f"{_PREFIX + layer + _LORA_A!r}."
                )


def _num_blocks(layers: Iterable[str], blocks: str) -> int:
    """1 + the largest number of a block, 0 without any; not more than a base may have."""
    matches = (re.match(rf"{re.escape(blocks)}\.(\d{{1,4}})\.", layer) for layer in layers)
    return min(_MAX_BLOCKS, max((1 + int(match[1]) for match in matches if match), default=0))


def _is_partial(fused: Iterable[str], peft: PeftSettings) -> bool:
    """Whether some blocks are without a layer that others have, or have one only because they are named."""
    layers = [layer.removeprefix(_PREFIX) for layer in fused]
    num_kinds = len({layer.rpartition(".")[2] for layer in layers})
    further = (f"{blocks}.{_MAX_BLOCKS}.{name}" for blocks, names in _BLOCK_LAYERS.items() for name in names)
    return len(layers) < num_kinds * _num_blocks(layers, "model.layers") or not any(map(peft.selects, further))


def _hf_layer(layer: str) -> str:
    """base_model.model.transformer.h.0.mixer.Wqkv, of the original code -> base_model.model.model.layers.0..."""
    return _PREFIX + convert_name(layer.removeprefix(_PREFIX)) if layer.startswith(_PREFIX) else layer


def _read_update(weights: Mapping[str, Tensor], layer: str, peft: PeftSettings, source: str) -> _Update:
    a, b = weights[layer + _LORA_A], weights.get(layer + _LORA_B)
    name = layer.removeprefix(_PREFIX)
    if b is None:
        raise InputError(f"{source}: has no weight {layer + _LORA_B!r}, which this adapter needs.")
    rank = peft.rank(name)
    expected = {_LORA_A: (rank, *a.shape[-1:]), _LORA_B: (*b.shape[:1], rank)}
    for suffix, weight in ((_LORA_A, a), (_LORA_B, b)):
        if weight.shape != expected[suffix]:
            raise InputError(
                f"{source}: weight {layer + suffix!r} has shape {tuple(weight.shape)}; expected {expected[suffix]}, "
                f"of the rank in {ADAPTER_CONFIG_FILE}."
            )
        if not weight.is_floating_point():
            raise InputError(f"{source}: weight {layer + suffix!r} is {weight.dtype}; expected floating-point numbers.")
    return _Update(a, b, peft.scale(name))


def _fuse_qkv(updates: Mapping[str, _Update], source: str) -> dict[str, _Update]:
    """q_proj, k_proj and v_proj of each block as one Wqkv; a projection without weights is not changed."""
    fused: dict[str, _Update] = {}
    for layer, update in updates.items():
        attn, _, projection = layer.rpartition(".")
        if projection not in QKV_PROJECTIONS:
            fused[layer] = update
            continue
        if f"{attn}.Wqkv" in updates:
            raise InputError(f"{source}: has weights of both {layer!r} and {attn + '.Wqkv'!r}.")
        if f"{attn}.Wqkv" not in fused:
            names = (name for name in QKV_PROJECTIONS if f"{attn}.{name}" in updates)
            fused[f"{attn}.Wqkv"] = _stack({name: updates[f"{attn}.{name}"] for name in names}, attn, source)
    return fused


def _stack(parts: Mapping[str, _Update], attn: str, source: str) -> _Update:
    """The update of Wqkv's rows, from those of some or all of its three parts."""
    first, *others = parts.values()
    if any(part.a.shape[1] != first.a.shape[1] or len(part.b) != len(first.b) for part in others):
        raise InputError(f"{source}: q_proj, k_proj and v_proj have weights of different shapes ({attn!r}).")
    is_shared = all(part.scale == first.scale and torch.equal(part.a, first.a) for part in others)
    if is_shared and len(parts) == len(QKV_PROJECTIONS):
        return _Update(first.a, torch.cat([part.b for part in parts.values()]), first.scale)
    if len({part.scale for part in parts.values()}) > 1:
        parts = {name: _scaled(part) for name, part in parts.items()}
    a = first.a if is_shared else torch.cat([part.a.float() for part in parts.values()])
    b = a.new_zeros(len(QKV_PROJECTIONS) * len(first.b), len(a), dtype=torch.float32)
    start = 0
    for name, part in parts.items():
        rows = QKV_PROJECTIONS.index(name) * len(part.b)
        b[rows : rows + len(part.b), start : start + part.b.shape[1]] = part.b
        start += 0 if is_shared else len(part.a)
    return _Update(a, b, next(iter(parts.values())).scale)


def _equalize(
    updates: dict[str, _Update], peft: PeftSettings, *, source: str
) -> tuple[LoraSettings, dict[str, _Update]]:
    """The same updates with one rank and one scale, alpha / rank."""
    ranks, targets = [len(update.a) for update in updates.values()], peft.fused_targets(updates)
    rank, scales = max(ranks), {update.scale for update in updates.values()}
    if rank > _MAX_PADDING * min(ranks):
        raise InputError(
            f"{source}: has ranks from {min(ranks)} to {rank}; the largest may be {_MAX_PADDING} times the smallest."
        )
    if peft.use_rslora and {rank} == set(ranks) and peft.lora_alpha == int(peft.lora_alpha):
        kept = LoraSettings(rank, int(peft.lora_alpha), targets, use_rslora=True)
        if kept.lora_alpha >= 1 and {Fraction(kept.scale)} == scales:
            return kept, updates
    alpha = rank * min(scales)
    if len(scales) > 1 or alpha.denominator != 1 or not 1 <= alpha <= MAX_ALPHA:
        updates, alpha = {layer: _scaled(update) for layer, update in updates.items()}, Fraction(rank)
    updates = {layer: _padded(update, rank, layer) for layer, update in updates.items()}
    settings = LoraSettings(rank, int(alpha), targets)
    if (settings.lora_r, settings.lora_alpha) != (peft.r, peft.lora_alpha):
        _log_fused(source, settings.lora_r, settings.lora_alpha)
    return settings, updates


@functools.cache  # once: settings, model and training read the same adapter
def _log_fused(source: str, rank: int, alpha: int) -> None:
    log.info("%s: as LoRA of the fused layers it has rank %d and alpha %d", source, rank, alpha)


def _scaled(update: _Update) -> _Update:
    """The same update with its scale in B."""
    return replace(update, b=update.b.float() * float(update.scale), scale=Fraction(1))


def _padded(update: _Update, rank: int, layer: str) -> _Update:
    """The same update with more ranks; the new rows of A are those of a new adapter, because A = B = 0 never learns."""
    missing = rank - len(update.a)
    if not missing:
        return update
    a = torch.cat([update.a.float(), new_lora_a(layer, missing, update.a.shape[1])])
    return replace(update, a=a, b=torch.nn.functional.pad(update.b.float(), (0, missing)))
