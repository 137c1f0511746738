"""adapters/peft_format.py."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save
from torch import Tensor

from lit_phi2.adapters.adapter import Adapter
from lit_phi2.errors import InputError
from lit_phi2.model.lora import QKV_PROJECTIONS, LoraSettings
from lit_phi2.utils.files import atomic_write, tree_digest
from lit_phi2.utils.paths import ADAPTER_CONFIG_FILE

WEIGHTS_FILE = "adapter_model.safetensors"

IDENTITY_FILE = "lit_phi2.json"


def save_adapter(adapter: Adapter, folder: Path) -> None:
    """Write an adapter in plain PEFT form for transformers' own Phi, each file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    targets = [
        native
        for target in adapter.settings.target_modules
        for native in (QKV_PROJECTIONS if target == "Wqkv" else (target,))
    ]
    config = LoraConfig(
        r=adapter.settings.lora_r,
        lora_alpha=adapter.settings.lora_alpha,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=adapter.base["base"],
        inference_mode=True,
    ).to_dict()
    config["target_modules"] = targets  # PEFT holds a set, whose order changes from run to run
    native = split_qkv(adapter.weights)
    identity = {**adapter.base, **asdict(adapter.settings), "template_version": adapter.template_version}
    identity["weights_digest"] = _weights_digest(native)
    atomic_write(folder / WEIGHTS_FILE, save(native, {"format": "pt"}))
    atomic_write(folder / ADAPTER_CONFIG_FILE, json.dumps(config, indent=2, default=str) + "\n")
    atomic_write(folder / IDENTITY_FILE, json.dumps(identity, indent=2) + "\n")


def split_qkv(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fused weights -> those of q_proj, k_proj and v_proj: A three times, B in three parts."""
    native: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if ".Wqkv." not in name:
            native[name] = weight.contiguous()
            continue
        parts = [weight] * 3 if ".lora_A." in name else weight.chunk(3, dim=0)
        for projection, part in zip(QKV_PROJECTIONS, parts, strict=True):
            native[name.replace(".Wqkv.", f".{projection}.")] = part.clone()
    return native


def merge_qkv(weights: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """The inverse of to_native.

    Raises:
        InputError: q, k and v do not share their A, so one fused layer of this rank cannot hold them.
    """
    fused: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if ".q_proj." in name:
            names = [name.replace(".q_proj.", f".{projection}.") for projection in QKV_PROJECTIONS]
            if missing := [name for name in names if name not in weights]:
                raise InputError(f"{source}: adapts q_proj but has no weight {missing[0]!r}.")
            parts = [weights[name] for name in names]
            if ".lora_A." in name and not all(torch.equal(parts[0], part) for part in parts[1:]):
                raise InputError(
                    f"{source}: q_proj, k_proj and v_proj have different A ({name!r}), so they are no Wqkv. Only "
                    "adapters trained on a fused Wqkv can be loaded."
                )
            fused_weight = weight if ".lora_A." in name else torch.cat(parts)
            fused[name.replace(".q_proj.", ".Wqkv.")] = fused_weight
        elif ".k_proj." not in name and ".v_proj." not in name:
            fused[name] = weight
    return fused


def _weights_digest(native: Mapping[str, Tensor]) -> str:
    return tree_digest(dict(sorted(native.items())))


def read_peft_folder(folder: Path) -> Adapter:
    try:
        config = json.loads((folder / ADAPTER_CONFIG_FILE).read_text("utf-8"))
        native = load_file(folder / WEIGHTS_FILE)
        identity_file = folder / IDENTITY_FILE
        identity = json.loads(identity_file.read_text("utf-8")) if identity_file.is_file() else {}
    except Exception as error:  # missing, damaged or not what their names say
        raise InputError(
            f"{folder}: is not a folder with a whole adapter ({ADAPTER_CONFIG_FILE}, {WEIGHTS_FILE}): {error}"
        ) from error
    expected = identity.get("weights_digest")  # not in an adapter that others wrote
    if expected not in (None, found := _weights_digest(native)):
        raise InputError(
            f"{folder / WEIGHTS_FILE}: is damaged: its digest is {found[:16]}, {IDENTITY_FILE} tells "
            f"{str(expected)[:16]}. Export it anew."
        )
    plain = {"use_dora": False, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "bias": "none"}
    for key, expected in plain.items():
        if config.get(key, expected) != expected:
            raise InputError(
                f"{folder / ADAPTER_CONFIG_FILE}: {key} is {config[key]!r}; only {expected!r} is supported."
            )
    targets = [target for target in config["target_modules"] if target not in QKV_PROJECTIONS]
    if any(target in config["target_modules"] for target in QKV_PROJECTIONS):
        targets.insert(0, "Wqkv")
    return Adapter(
        weights=merge_qkv(native, source=str(folder)),
        settings=LoraSettings(
            int(config["r"]), int(config["lora_alpha"]), tuple(identity.get("target_modules", targets))
        ),
        base={
            "base": str(identity.get("base", config["base_model_name_or_path"])),
            "base_revision": str(identity.get("base_revision", "")),
            "base_digest": str(identity.get("base_digest", "")),
        },
        template_version=int(identity.get("template_version", 0)),
    )
