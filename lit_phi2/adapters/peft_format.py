"""PEFT format: an adapter as a folder that plain PEFT loads on transformers' own Phi.

    Wqkv.lora_A (r, D)    ->  q_proj.lora_A = k_proj.lora_A = v_proj.lora_A (r, D)
    Wqkv.lora_B (3 D, r)  ->  q_proj.lora_B | k_proj.lora_B | v_proj.lora_B, each (D, r)

A is shared and the rows of B are split, which is exact in both directions. An adapter whose q, k and v have different A
does not fit a fused layer of its rank and is refused.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save
from torch import Tensor

from lit_phi2.adapters.adapter import Adapter
from lit_phi2.errors import InputError
from lit_phi2.model.lora import QKV_PROJECTIONS, LoraSettings
from lit_phi2.utils.files import atomic_write, tree_digest
from lit_phi2.utils.paths import ADAPTER_CONFIG_FILE

WEIGHTS_FILE = "adapter_model.safetensors"  # PEFT's name
METADATA_FILE = "lit_phi2.json"

# The settings of LoRA variants, and the only value of each that the fused layer computes.
_PLAIN_LORA = {"use_dora": False, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "bias": "none"}


def save_adapter(adapter: Adapter, folder: Path) -> None:
    """Write an adapter in plain PEFT form for transformers' own Phi; each file is complete or absent."""
    folder.mkdir(parents=True, exist_ok=True)
    targets = [
        hf_target
        for target in adapter.settings.target_modules
        for hf_target in (QKV_PROJECTIONS if target == "Wqkv" else (target,))
    ]
    config = LoraConfig(
        r=adapter.settings.lora_r,
        lora_alpha=adapter.settings.lora_alpha,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=adapter.base["base"],
        inference_mode=True,
    ).to_dict()
    config["target_modules"] = targets  # PEFT keeps a set, whose order changes from run to run
    weights = split_qkv(adapter.weights)
    metadata = {**adapter.base, **asdict(adapter.settings), "template_version": adapter.template_version}
    metadata["weights_digest"] = _weights_digest(weights)
    atomic_write(folder / WEIGHTS_FILE, save(weights, {"format": "pt"}))
    atomic_write(folder / ADAPTER_CONFIG_FILE, json.dumps(config, indent=2, default=str) + "\n")
    atomic_write(folder / METADATA_FILE, json.dumps(metadata, indent=2) + "\n")


def read_peft_folder(folder: Path) -> Adapter:
    """Read an adapter in PEFT form, ours or one that plain PEFT wrote.

    Raises:
        InputError: a file is missing or damaged, or the fused model cannot represent the adapter.
    """
    try:
        config = json.loads((folder / ADAPTER_CONFIG_FILE).read_text("utf-8"))
        weights = load_file(folder / WEIGHTS_FILE)
        metadata_file = folder / METADATA_FILE
        metadata = json.loads(metadata_file.read_text("utf-8")) if metadata_file.is_file() else {}
    except Exception as error:  # missing, damaged, or not what its name says
        raise InputError(
            f"{folder}: is not a folder with a complete adapter ({ADAPTER_CONFIG_FILE}, {WEIGHTS_FILE}): {error}"
        ) from error
    _check_digest(folder, weights, metadata)
    for key, plain in _PLAIN_LORA.items():
        if config.get(key, plain) != plain:
            raise InputError(f"{folder / ADAPTER_CONFIG_FILE}: {key} is {config[key]!r}; only {plain!r} is supported.")
    targets = [target for target in config["target_modules"] if target not in QKV_PROJECTIONS]
    if any(target in config["target_modules"] for target in QKV_PROJECTIONS):
        targets.insert(0, "Wqkv")
    return Adapter(
        weights=merge_qkv(weights, source=str(folder)),
        settings=LoraSettings(
            int(config["r"]), int(config["lora_alpha"]), tuple(metadata.get("target_modules", targets))
        ),
        base={
            "base": str(metadata.get("base", config["base_model_name_or_path"])),
            "base_revision": str(metadata.get("base_revision", "")),
            "base_digest": str(metadata.get("base_digest", "")),
        },
        template_version=int(metadata.get("template_version", 0)),
    )


def _check_digest(folder: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Refuse weights that differ from those that were written; other tools write no digest."""
    expected, digest = metadata.get("weights_digest"), _weights_digest(weights)
    if expected not in (None, digest):
        raise InputError(
            f"{folder / WEIGHTS_FILE}: is damaged: its digest is {digest[:16]}, but {METADATA_FILE} has "
            f"{str(expected)[:16]}. Export the adapter again."
        )


def _weights_digest(weights: Mapping[str, Tensor]) -> str:
    return tree_digest(dict(sorted(weights.items())))


def split_qkv(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with Wqkv -> weights with q_proj, k_proj and v_proj: A three times, B in three parts."""
    hf_weights: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if ".Wqkv." not in name:
            hf_weights[name] = weight.contiguous()
            continue
        parts = [weight] * 3 if ".lora_A." in name else weight.chunk(3, dim=0)
        for projection, part in zip(QKV_PROJECTIONS, parts, strict=True):
            hf_weights[name.replace(".Wqkv.", f".{projection}.")] = part.clone()
    return hf_weights


def merge_qkv(hf_weights: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """The inverse of split_qkv.

    Raises:
        InputError: q, k and v do not share their A, so one fused layer of this rank cannot hold them.
    """
    weights: dict[str, Tensor] = {}
    for name, weight in hf_weights.items():
        if ".q_proj." in name:
            names = [name.replace(".q_proj.", f".{projection}.") for projection in QKV_PROJECTIONS]
            if missing := [name for name in names if name not in hf_weights]:
                raise InputError(f"{source}: adapts q_proj but has no weight {missing[0]!r}.")
            parts = [hf_weights[name] for name in names]
            if ".lora_A." in name and not all(torch.equal(parts[0], part) for part in parts[1:]):
                raise InputError(
                    f"{source}: q_proj, k_proj and v_proj have different A ({name!r}), which a fused Wqkv cannot "
                    "represent. Only adapters trained on a fused Wqkv can be loaded."
                )
            weights[name.replace(".q_proj.", ".Wqkv.")] = weight if ".lora_A." in name else torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            weights[name] = weight
    return weights
