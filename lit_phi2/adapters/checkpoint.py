"""adapters/checkpoint.py."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_phi2.adapters.adapter import Adapter
from lit_phi2.adapters.peft_format import read_peft_folder
from lit_phi2.errors import InputError
from lit_phi2.model.lora import LoraSettings
from lit_phi2.utils.files import tree_digest


def read_adapter(path: Path) -> Adapter:
    """The adapter in a checkpoint (.ckpt) or in a folder in PEFT form.

    Raises:
        InputError: not such a file or folder, damaged, or an adapter that the fused model cannot represent.
    """
    return read_peft_folder(path) if path.is_dir() else read_checkpoint(path)[0]


def read_checkpoint(path: Path) -> tuple[Adapter, dict[str, Any]]:
    """The adapter in a checkpoint, and the whole checkpoint; no code in it is run.

    Raises:
        InputError: not a checkpoint of lit_phi2, or damaged.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        expected = checkpoint.pop("digest")
        adapter = adapter_from_state(checkpoint["lit_phi2"], checkpoint["state_dict"])
        found = tree_digest(checkpoint)
    except Exception as error:  # torch raises many kinds for a damaged or hostile file
        raise InputError(f"{path}: is not a whole checkpoint of lit_phi2 ({type(error).__name__}).") from error
    if found != expected:
        raise InputError(f"{path}: is damaged: its digest is {found[:16]}, but {str(expected)[:16]} was written.")
    return adapter, checkpoint


def adapter_to_state(adapter: Adapter) -> dict[str, Any]:
    """Everything of an adapter but its weights, as plain values."""
    return {
        **adapter.base,
        "lora_r": adapter.settings.lora_r,
        "lora_alpha": adapter.settings.lora_alpha,
        "target_modules": list(adapter.settings.target_modules),
        "template_version": adapter.template_version,
    }


def adapter_from_state(state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Adapter:
    """The inverse of adapter_to_state."""
    return Adapter(
        weights=dict(weights),
        settings=LoraSettings(int(state["lora_r"]), int(state["lora_alpha"]), tuple(state["target_modules"])),
        base={key: str(state[key]) for key in ("base", "base_revision", "base_digest")},
        template_version=int(state["template_version"]),
    )
