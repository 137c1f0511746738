"""Loading: the weights of an ordinary Phi checkpoint, streamed into the fused model.

    q_proj.weight, k_proj.weight, v_proj.weight, each (D, D)  ->  rows of Wqkv.weight (3 D, D); everything else by name

Rows are copied and nothing is computed, so the fused model is exactly the checkpoint's.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PhiConfig
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding

from lit_phi2.errors import InputError
from lit_phi2.model.phi2 import FusedPhiForCausalLM
from lit_phi2.pretrained import BaseModel


def load_phi2(base: BaseModel, dtype: torch.dtype) -> FusedPhiForCausalLM:
    """Load the base on the CPU, in eval mode, with its weights in dtype. Nothing is downloaded.

    Weights are read one tensor at a time, so a float16 Phi-2 of 5.6 GB takes 5.6 GB in bfloat16 and never twice that.

    Raises:
        InputError: a weight is missing, unexpected or of another shape, or its file is damaged.
    """
    config = PhiConfig.from_pretrained(base.folder, local_files_only=True)
    config.dtype = dtype
    with torch.device("meta"):
        model = FusedPhiForCausalLM(config)
    nn.Module.to(model, dtype).to_empty(device="cpu")
    model.model.rotary_emb = PhiRotaryEmbedding(config)  # its frequencies are computed, not saved
    try:
        problems = _copy_weights(base.folder, dict(_hf_parameter_views(model)))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"model.base: the weights in {base.folder} cannot be read ({error}). Download them again."
        ) from error
    for kind, names in problems.items():
        if names:
            raise InputError(
                f"model.base: the weights in {base.folder} do not match its config.json: {kind}, the first of "
                f"{len(names)} is {min(names)}. Download them again."
            )
    return model.eval()


def _copy_weights(folder: Path, views: dict[str, Tensor]) -> dict[str, list[str]]:
    """Copy the weights of a checkpoint; returns the names of those that do not fit, by kind of problem."""
    mismatched: list[str] = []
    unexpected: list[str] = []
    missing = set(views)
    for name, weight in _iter_weights(folder):
        if name not in views:
            unexpected.append(name)
        elif weight.shape != views[name].shape:
            mismatched.append(name)
        else:
            views[name].copy_(weight)
        missing.discard(name)
    return {"missing keys": sorted(missing), "mismatched keys": mismatched, "unexpected keys": unexpected}


def _hf_parameter_views(model: FusedPhiForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """Each parameter of transformers' Phi by its name there, as a view of the fused model's memory."""
    for name, parameter in model.named_parameters():
        if ".Wqkv." not in name:
            yield name, parameter.data
            continue
        for projection, rows in zip("qkv", parameter.data.chunk(3), strict=True):
            yield name.replace(".Wqkv.", f".{projection}_proj."), rows


def _iter_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint, one at a time, each mapped from its file until it is released."""
    index = folder / "model.safetensors.index.json"
    shards = ["model.safetensors"]
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    for shard in shards:
        with safe_open(folder / shard, "pt") as file:
            names = list(file.keys())
        for name in names:  # the file is opened for each tensor: what was read stays in memory until it is closed
            with safe_open(folder / shard, "pt") as file:
                yield name, file.get_tensor(name)


def linear_layers(base: BaseModel) -> dict[str, int]:
    """Name of each linear layer of a block -> number of blocks that have it, without loading the base."""
    with torch.device("meta"):
        blocks = FusedPhiForCausalLM(PhiConfig.from_pretrained(base.folder, local_files_only=True)).model.layers
    names = [name.rpartition(".")[2] for name, module in blocks.named_modules() if isinstance(module, nn.Linear)]
    return {name: names.count(name) for name in names}
