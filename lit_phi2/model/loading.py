"""model/loading.py."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PhiConfig
from transformers.models.phi.modeling_phi import (
    PhiRotaryEmbedding,
)

from lit_phi2.errors import InputError
from lit_phi2.model.phi2 import FusedPhiForCausalLM
from lit_phi2.pretrained import BaseModel


def load_phi2(base: BaseModel, dtype: torch.dtype) -> FusedPhiForCausalLM:
    """The base on the CPU, in eval mode, its weights in dtype; nothing is downloaded here.

    Tensor by tensor, so that no more of the files is in memory than the tensor being copied: a float16 Phi-2 of 5.6 GB
    takes 5.6 GB in bfloat16 and never twice that.

    Raises:
        InputError: a weight is missing, left over, of another shape, or its file is damaged.
    """
    config = PhiConfig.from_pretrained(base.folder, local_files_only=True)
    config.dtype = dtype
    with torch.device("meta"):
        model = FusedPhiForCausalLM(config)
    nn.Module.to(model, dtype).to_empty(device="cpu")
    model.model.rotary_emb = PhiRotaryEmbedding(config)  # its frequencies are computed, not saved
    places = dict(_hf_parameter_views(model))
    faults: dict[str, list[str]] = {"missing keys": [], "mismatched keys": [], "unexpected keys": []}
    missing = set(places)
    try:
        for name, weight in _read_weights(base.folder):
            if name not in places:
                faults["unexpected keys"].append(name)
            elif weight.shape != places[name].shape:
                faults["mismatched keys"].append(name)
            else:
                places[name].copy_(weight)
            missing.discard(name)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"model.base: the weights in {base.folder} cannot be read ({error}). Get them anew."
        ) from error
    faults["missing keys"] = sorted(missing)
    for kind, names in faults.items():
        if names:
            raise InputError(
                f"model.base: the weights in {base.folder} do not fit its config.json: {kind}, the first of "
                f"{len(names)} is {min(names)}. Get them anew."
            )
    return model.eval()


def _hf_parameter_views(model: FusedPhiForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """Each weight of the ordinary Phi and the memory that it goes to: the rows of Wqkv are q's, then k's, then v's."""
    for name, parameter in model.named_parameters():
        if ".Wqkv." not in name:
            yield name, parameter.data
            continue
        for projection, rows in zip("qkv", parameter.data.chunk(3), strict=True):
            yield name.replace(".Wqkv.", f".{projection}_proj."), rows


def _read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint, one after another, each mapped to its file until it is let go."""
    index = folder / "model.safetensors.index.json"
    shards = ["model.safetensors"]
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    for shard in shards:
        with safe_open(folder / shard, "pt") as file:
            names = list(file.keys())
        for name in names:  # opened anew for each: what was read stays in memory until the file is closed
            with safe_open(folder / shard, "pt") as file:
                yield name, file.get_tensor(name)


def linear_layers(base: BaseModel) -> dict[str, int]:
    """The names of the linear layers of a block, and how many blocks have each, without loading the base.

    Block by block, so that a target can be asked to match equally many per layer.
    """
    with torch.device("meta"):
        blocks = FusedPhiForCausalLM(PhiConfig.from_pretrained(base.folder, local_files_only=True)).model.layers
    names = [name.rpartition(".")[2] for name, module in blocks.named_modules() if isinstance(module, nn.Linear)]
    return {name: names.count(name) for name in names}
