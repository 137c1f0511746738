"""PEFT format: an adapter as a folder that plain PEFT loads on transformers' own Phi.

    Wqkv.lora_A (r, D)    ->  q_proj.lora_A = k_proj.lora_A = v_proj.lora_A (r, D)
    Wqkv.lora_B (3 D, r)  ->  q_proj.lora_B | k_proj.lora_B | v_proj.lora_B, each (D, r)

A is shared and the rows of B are split, which is exact in both directions. What another tool trained, with an A of its
own for q, k and v, becomes LoRA of the fused layer in `fuse.py`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save
from torch import Tensor

from lit_phi2.adapters.adapter import Adapter
from lit_phi2.adapters.fuse import fuse_adapter
from lit_phi2.adapters.lora_config import hf_targets, read_peft_settings
from lit_phi2.errors import InputError
from lit_phi2.model.lora import QKV_PROJECTIONS
from lit_phi2.utils.files import atomic_write, tree_digest
from lit_phi2.utils.json_objects import TEXT, check_values, describe, integer, read_json_object
from lit_phi2.utils.locks import file_lock
from lit_phi2.utils.paths import ADAPTER_CONFIG_FILE

WEIGHTS_FILE = "adapter_model.safetensors"  # PEFT's name
METADATA_FILE = "lit_phi2.json"
ADAPTER_FILES = (WEIGHTS_FILE, ADAPTER_CONFIG_FILE, METADATA_FILE)
FOLDER_FORMAT = 2  # raised when a key of METADATA_FILE changes its name or meaning

_METADATA = {
    "format_version": integer(1, 2**31 - 1),
    "base": TEXT,
    "base_revision": TEXT,
    "base_digest": TEXT,
    "template_version": integer(0, 2**31 - 1),
    "template_digest": TEXT,
    "digest": TEXT,
}


def save_adapter(adapter: Adapter, folder: Path, provenance: Mapping[str, str] = {}) -> None:
    """Write an adapter in plain PEFT form for transformers' own Phi; each file is complete or absent.

    Args:
        adapter: to write.
        folder: is created.
        provenance: for the metadata of the safetensors file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    targets = hf_targets(adapter.settings.target_modules)
    lora_config = LoraConfig(
        r=adapter.settings.lora_r,
        lora_alpha=adapter.settings.lora_alpha,
        target_modules=targets,
        use_rslora=adapter.settings.use_rslora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=adapter.base["base"],
        inference_mode=True,
    ).to_dict()
    lora_config["target_modules"] = targets  # PEFT keeps a set, whose order changes from run to run
    config = json.dumps(lora_config, indent=2, default=str) + "\n"
    weights = split_qkv(adapter.weights)
    metadata = {
        "format_version": FOLDER_FORMAT,
        **adapter.base,
        "template_version": adapter.template_version,
        "template_digest": adapter.template_digest,
    }
    metadata["digest"] = _folder_digest(weights, json.loads(config), metadata)
    # Of two exports to one folder the second waits, so that the files of the folder belong together.
    with file_lock(folder / "adapter.lock", waiting=f"{folder}: waiting for another export"):
        atomic_write(folder / WEIGHTS_FILE, save_tensors(weights, {"format": "pt", **provenance}))
        atomic_write(folder / ADAPTER_CONFIG_FILE, config)
        atomic_write(folder / METADATA_FILE, json.dumps(metadata, indent=2) + "\n")


def save_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file; the package writes several metadata in an order that changes from call to call."""
    content = save(dict(tensors), dict(metadata))
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[start:]


def read_peft_folder(folder: Path) -> Adapter:
    """Read an adapter in PEFT form, ours or one that plain PEFT wrote.

    Raises:
        InputError: a file is missing or damaged, or the fused model cannot represent the adapter.
    """
    config_file = folder / ADAPTER_CONFIG_FILE
    config = read_json_object(config_file)
    metadata = _read_metadata(folder / METADATA_FILE)
    try:
        weights = load_file(folder / WEIGHTS_FILE)
    except Exception as error:  # missing, damaged, or not what its name says
        raise InputError(
            f"{folder}: is not a folder with a complete adapter: {WEIGHTS_FILE} cannot be read ({error})."
        ) from error
    if metadata:
        _check_digest(folder, _folder_digest(weights, config, metadata), metadata["digest"])
    peft = read_peft_settings(config, source=str(config_file))
    fused = fuse_adapter(weights, peft, source=str(folder))
    return Adapter(
        weights=fused.weights,
        settings=fused.settings,
        base={
            "base": metadata.get("base", config.get("base_model_name_or_path") or ""),
            "base_revision": metadata.get("base_revision", ""),
            "base_digest": metadata.get("base_digest", ""),
        },
        template_version=metadata.get("template_version", 0),
        template_digest=metadata.get("template_digest", ""),
        is_partial=fused.is_partial,
    )


def _read_metadata(file: Path) -> dict[str, Any]:
    """What lit_phi2 wrote beside the adapter; empty for an adapter of another tool."""
    if not file.exists():
        return {}
    metadata = read_json_object(file)
    format_version = metadata.get("format_version", 1)  # the first format had none
    if format_version != FOLDER_FORMAT:
        raise InputError(
            f"{file}: was written by another lit_phi2: its format is {describe(format_version)}, this one reads "
            f"{FOLDER_FORMAT}. Train again, or remove {file.name}: the adapter is then used on model.base, "
            "whichever base it was trained on."
        )
    check_values(metadata, _METADATA, source=str(file), required=_METADATA.keys() - {"template_digest"})
    return metadata


def _check_digest(folder: Path, digest: str, expected: str) -> None:
    if digest != expected:
        raise InputError(
            f"{folder}: is damaged, or {WEIGHTS_FILE} or {ADAPTER_CONFIG_FILE} was changed: their digest is "
            f"{digest[:16]}, but {METADATA_FILE} has {expected[:16]}. Export the adapter again."
        )


def _folder_digest(weights: Mapping[str, Tensor], config: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    """Of the weights and of all that is said about them, however the files are formatted."""
    values = [{key: value for key, value in metadata.items() if key != "digest"}, config]
    return tree_digest([json.dumps(values, sort_keys=True), dict(sorted(weights.items()))])


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
        InputError: only some of q, k and v have weights, or they do not share their A, so one fused layer of this rank
            cannot hold them.
    """
    weights: dict[str, Tensor] = {}
    for name, weight in hf_weights.items():
        projection = next((projection for projection in QKV_PROJECTIONS if f".{projection}." in name), None)
        if projection is None:
            weights[name] = weight
            continue
        names = [name.replace(f".{projection}.", f".{other}.") for other in QKV_PROJECTIONS]
        if missing := [other for other in names if other not in hf_weights]:
            raise InputError(f"{source}: adapts {projection} but has no weight {missing[0]!r}.")
        if projection != QKV_PROJECTIONS[0]:
            continue
        parts = [hf_weights[other] for other in names]
        if ".lora_A." in name and not all(torch.equal(parts[0], part) for part in parts[1:]):
            raise InputError(
                f"{source}: q_proj, k_proj and v_proj have different A ({name!r}), which a fused Wqkv cannot "
                "represent. Only adapters trained on a fused Wqkv can be loaded."
            )
        if parts[0].dim() != 2 or len({part.shape[1:] for part in parts}) > 1:
            raise InputError(f"{source}: q_proj, k_proj and v_proj have weights of different shapes ({name!r}).")
        weights[name.replace(".q_proj.", ".Wqkv.")] = weight if ".lora_A." in name else torch.cat(parts)
    return weights
