"""Merged: a whole model as a folder in Hugging Face form, as transformers, vLLM, ONNX Runtime and OpenVINO read it.

    config.json               the base's settings, with both forms of those of rope, and no code
    generation_config.json    EOS
    tokenizer*.json           the base's, with our template as chat_template
    model-0000N-of-0000M.safetensors and their index

Each adapted weight is W + scale B A in float32, rounded once to the dtype of the file. Tensors are read, merged
and written one at a time, so one is in memory.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from lit_phi2.export.template import chat_template
from lit_phi2.export.weights import ModelWeights, round_to
from lit_phi2.pretrained import BaseModel, read_model_config
from lit_phi2.utils.json_objects import read_json_object

SHARD_BYTES = 10**9
_INDEX_FILE = "model.safetensors.index.json"
_SAFETENSORS_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")


def write_merged(
    weights: ModelWeights,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype | None,
    progress: Callable[[int], None] = lambda num_bytes: None,
    provenance: Mapping[str, str] = {},
) -> None:
    """Write a model in Hugging Face form.

    Args:
        weights: of the base, merged or alone.
        tokenizer: of the base.
        folder: exists.
        dtype: of the files; None keeps the dtype in which the base is saved.
        progress: called with the bytes of each tensor.
        provenance: for the metadata of the safetensors files.
    """
    dtype = dtype or weights.saved_dtype
    _write_shards(weights, folder, dtype, progress, provenance)
    _write_json(folder / "config.json", merged_config(weights, tokenizer, dtype))
    generation = {**_token_ids(tokenizer), "do_sample": False, "transformers_version": transformers.__version__}
    _write_json(folder / "generation_config.json", generation)
    write_tokenizer(weights.base, folder)


def merged_config(weights: ModelWeights, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of the base in this dtype, as transformers 4 and 5, vLLM and mlx-lm read it."""
    values = read_model_config(weights.base)
    rope = values["rope_parameters"]
    name = str(dtype).removeprefix("torch.")
    # transformers 5 nests the rope settings, everything older reads them at the top level. mlx-lm reads no others, and
    # takes Phi-2's own where it finds none, without a message.
    former = {"rope_theta": rope["rope_theta"], "partial_rotary_factor": rope["partial_rotary_factor"]}
    if rope["rope_type"] != "default":
        former["rope_scaling"] = {"type": rope["rope_type"], "factor": rope["factor"]}
    # Each program has defaults of its own for what a config.json leaves out: mlx-lm's has Phi-2's 32 heads.
    complete = {key: getattr(weights.config, key) for key in ("num_key_value_heads", "layer_norm_eps", "hidden_act")}
    return {
        "architectures": ["PhiForCausalLM"],
        "model_type": "phi",
        **complete,
        **values,
        **former,
        **_token_ids(tokenizer),
        "dtype": name,
        "torch_dtype": name,
        "use_cache": True,
        "transformers_version": transformers.__version__,
    }


def write_tokenizer(base: BaseModel, folder: Path) -> None:
    """Copy the base's tokenizer, with our template as its chat_template."""
    for name in _TOKENIZER_FILES:
        if (base.folder / name).is_file():
            shutil.copyfile(base.folder / name, folder / name)
    config_file = base.folder / "tokenizer_config.json"
    config = read_json_object(config_file) if config_file.is_file() else {}
    for key in [key for key in config if key == "auto_map" or key.endswith(("_file", "name_or_path"))]:
        del config[key]  # names code, or where another machine had the files
    if config.get("tokenizer_class", "TokenizersBackend") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the same class by the name that transformers 4 knows
    _write_json(folder / "tokenizer_config.json", config | {"chat_template": chat_template()})


def shard_names(shapes: dict[str, torch.Size], element_bytes: int) -> dict[str, str]:
    """Name of each tensor -> its file, in files of at most SHARD_BYTES each where a tensor is not larger."""
    shard_of, filled, shard = {}, 0, 0
    for name, shape in shapes.items():
        num_bytes = shape.numel() * element_bytes
        if filled and filled + num_bytes > SHARD_BYTES:
            filled, shard = 0, shard + 1
        filled += num_bytes
        shard_of[name] = shard
    if shard == 0:
        return dict.fromkeys(shapes, "model.safetensors")
    return {name: f"model-{i + 1:05d}-of-{shard + 1:05d}.safetensors" for name, i in shard_of.items()}


def _write_shards(
    weights: ModelWeights,
    folder: Path,
    dtype: torch.dtype,
    progress: Callable[[int], None],
    provenance: Mapping[str, str],
) -> None:
    shards = shard_names(weights.shapes, dtype.itemsize)
    tensors = iter(weights)
    for shard in dict.fromkeys(shards.values()):
        shapes = {name: shape for name, shape in weights.shapes.items() if shards[name] == shard}
        with (folder / shard).open("wb") as file:
            file.write(_safetensors_header(shapes, dtype, provenance))
            for name, weight in islice(tensors, len(shapes)):  # in the order of the shapes
                rounded = round_to(weight, dtype, name)
                file.write(rounded.reshape(-1).view(torch.uint8).numpy().data)
                progress(rounded.nbytes)
    if len(set(shards.values())) > 1:
        total = sum(shape.numel() for shape in weights.shapes.values())
        metadata = {"total_parameters": total, "total_size": total * dtype.itemsize}
        _write_json(folder / _INDEX_FILE, {"metadata": metadata, "weight_map": dict(sorted(shards.items()))})


def _safetensors_header(shapes: Mapping[str, torch.Size], dtype: torch.dtype, provenance: Mapping[str, str]) -> bytes:
    """What precedes the tensors: the package safetensors writes whole files only, from memory.

    Format: https://github.com/huggingface/safetensors#format
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **provenance}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + shape.numel() * dtype.itemsize
        header[name] = {"dtype": _SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    return {"bos_token_id": eos if bos is None else bos, "eos_token_id": eos}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
