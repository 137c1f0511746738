"""Checkpoint: the adapter inside a .ckpt, and reading an adapter from wherever it is.

    checkpoint["state_dict"]    the adapter's weights, and nothing of the base
    checkpoint["lit_phi2"]      format_version, base, settings, template_version, the run's fingerprint
    checkpoint["digest"]        of everything else

It loads with `weights_only=True`: it contains plain values and tensors, and no code in it is run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_phi2.adapters.adapter import Adapter
from lit_phi2.adapters.peft_format import read_peft_folder
from lit_phi2.errors import InputError
from lit_phi2.export.imports import is_mlx_adapter, read_gguf_adapter, read_mlx_adapter
from lit_phi2.model.lora import LoraSettings
from lit_phi2.utils.files import tree_digest
from lit_phi2.utils.json_objects import OBJECT, TEXT, TEXTS, check_values, integer, one_of
from lit_phi2.utils.paths import GGUF_SUFFIX

# Raised when a key of checkpoint["lit_phi2"] changes its name or meaning, or a new one changes that of the weights.
CHECKPOINT_FORMAT = 4
_PLAIN_LORA_FORMAT = 3  # without use_rslora; whoever reads only this one would take such weights for plain LoRA

_STATE = {
    "base": TEXT,
    "base_revision": TEXT,
    "base_digest": TEXT,
    "lora_r": integer(1, 2**31 - 1),
    "lora_alpha": integer(1, 2**31 - 1),
    "target_modules": TEXTS,
    "use_rslora": one_of(True, False),
    "template_version": integer(0, 2**31 - 1),
    "template_digest": TEXT,  # checkpoints of either format may lack it
    "quantization": OBJECT,  # of a run in 8 bits
    "run": OBJECT,
    "environment": OBJECT,
    "accumulate_grad_batches": integer(1, 2**31 - 1),
    "loss_scale": OBJECT,  # of runs in float16 only
    "compiled": one_of(True, False),
}


def read_adapter(path: Path) -> Adapter:
    """Read the adapter in a checkpoint (.ckpt), in a folder in PEFT form, or in a GGUF or MLX export.

    Raises:
        InputError: there is no such file or folder, it is damaged, or the fused model cannot represent the adapter.
    """
    if path.is_dir():
        return read_mlx_adapter(path) if is_mlx_adapter(path) else read_peft_folder(path)
    return read_gguf_adapter(path) if path.suffix == GGUF_SUFFIX else read_checkpoint(path)[0]


def read_checkpoint(path: Path) -> tuple[Adapter, dict[str, Any]]:
    """Read the adapter in a checkpoint, and the whole checkpoint without its digest.

    Raises:
        InputError: the file is no checkpoint of lit_phi2, of another format, or damaged.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or hostile file
        raise InputError(f"{path}: is not a complete checkpoint of lit_phi2 ({type(error).__name__}).") from error
    return check_checkpoint(checkpoint, source=str(path)), checkpoint


def check_checkpoint(checkpoint: dict[str, Any], *, source: str) -> Adapter:
    """The adapter in a checkpoint, whose digest is compared and removed.

    Args:
        checkpoint: as torch.load returns it.
        source: where it comes from, for messages.

    Raises:
        InputError: it is no checkpoint of lit_phi2, of another format, or damaged.
    """
    try:
        expected = checkpoint.pop("digest")
        digest = tree_digest(checkpoint)
        state, weights = checkpoint["lit_phi2"], checkpoint["state_dict"]
        if not all(isinstance(weight, Tensor) for weight in weights.values()):
            raise TypeError("a weight is no tensor")
        format_version = state.get("format_version")
    except Exception as error:  # its values may be of any kind
        raise InputError(f"{source}: is not a complete checkpoint of lit_phi2 ({type(error).__name__}).") from error
    if digest != expected:
        raise InputError(f"{source}: is damaged: its digest is {digest[:16]}, but {str(expected)[:16]} was written.")
    if format_version not in (_PLAIN_LORA_FORMAT, CHECKPOINT_FORMAT):
        raise InputError(
            f"{source}: is a checkpoint of another lit_phi2: its format is {format_version or 1}, this one reads "
            f"{_PLAIN_LORA_FORMAT} and {CHECKPOINT_FORMAT}. Train again, or remove lit_phi2.json from the run's "
            "adapter folder and start from that with --model.adapter."
        )
    absent = {"template_digest", "quantization", "loss_scale", "compiled"}
    absent |= {"use_rslora"} if format_version == _PLAIN_LORA_FORMAT else set()
    check_values(state, _STATE, source=source, required=_STATE.keys() - absent)
    return adapter_from_state(state, weights)


def adapter_to_state(adapter: Adapter) -> dict[str, Any]:
    """Everything in an adapter except its weights, as plain values."""
    return {
        "format_version": CHECKPOINT_FORMAT,
        **adapter.base,
        "lora_r": adapter.settings.lora_r,
        "lora_alpha": adapter.settings.lora_alpha,
        "target_modules": list(adapter.settings.target_modules),
        "use_rslora": adapter.settings.use_rslora,
        "template_version": adapter.template_version,
        "template_digest": adapter.template_digest,
        **({} if adapter.quantization is None else {"quantization": adapter.quantization}),
    }


def adapter_from_state(state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Adapter:
    """The inverse of adapter_to_state."""
    return Adapter(
        weights=dict(weights),
        settings=LoraSettings(
            state["lora_r"], state["lora_alpha"], tuple(state["target_modules"]), state.get("use_rslora", False)
        ),
        base={key: state[key] for key in ("base", "base_revision", "base_digest")},
        template_version=state["template_version"],
        template_digest=state.get("template_digest", ""),
        quantization=state.get("quantization"),
    )
