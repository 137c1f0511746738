"""GGUF: the adapter, or the whole merged model, as llama.cpp, Ollama and LM Studio read them.

    model.layers.N.self_attn.q_proj  ->  blk.N.attn_q        self_attn.dense  ->  attn_output
    mlp.fc1                          ->  ffn_up              mlp.fc2          ->  ffn_down

An adapter's tensors are .weight.lora_a (r, in) and .weight.lora_b (out, r), float32. llama.cpp multiplies B A by
adapter.lora.alpha / r: the scale is multiplied into B, and r is written as alpha. That is exact where the scale is a
power of two. q, k and v are apart in both: llama.cpp crashes when it loads an adapter for them on a base with one
attn_qkv.

The file is written tensor by tensor: of the model, one tensor is in memory at a time.
"""

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_phi2.adapters.adapter import Adapter
from lit_phi2.errors import InputError
from lit_phi2.export.gguf_reader import ADAPTER_KEY, ARCHITECTURE, TENSOR_TYPES
from lit_phi2.export.metadata import adapter_metadata
from lit_phi2.export.names import gguf_name
from lit_phi2.export.template import chat_template
from lit_phi2.export.weights import ModelWeights, lora_pairs, round_to

_FILE_TYPES = {"float32": 0, "float16": 1, "q8_0": 7, "bfloat16": 32}  # LLAMA_FTYPE of llama.h
_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION of ggml.h
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # LLAMA_TOKEN_TYPE of llama.h
_Q8_0_BLOCK = 32  # elements with a scale of their own
_ROWS = 1024  # quantized at once, so that the copies of an embedding stay small
_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # the same function


def write_gguf_adapter(
    adapter: Adapter, num_layers: int, path: Path, keys: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write the adapter: 4 bytes for each of its parameters.

    Args:
        adapter: fits the base.
        num_layers: of the base; a layer may be without an adapter.
        path: the file.
        keys: further ones, with their texts.
    """
    gguf = import_gguf()
    rank = adapter.settings.lora_r
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    writer.add_string(ADAPTER_KEY, json.dumps(adapter_metadata(adapter, num_layers)))
    _add_texts(writer, keys)
    for layer, pair in lora_pairs(adapter).items():
        # llama.cpp divides alpha by the rank of this B, which may differ from the adapter's.
        scale = pair.scale * pair.b.shape[1] / rank
        name = gguf_name(f"{layer}.weight")
        writer.add_tensor(f"{name}.lora_a", pair.a.contiguous().numpy())
        writer.add_tensor(f"{name}.lora_b", (pair.b * scale).contiguous().numpy())
    with _writing(path):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def write_gguf_model(
    weights: ModelWeights,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    dtype: str,
    progress: Callable[[int], None] = lambda num_bytes: None,
    keys: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write a whole model; norms and biases are float32 in every dtype, as llama.cpp expects them.

    Args:
        weights: of the base, merged or alone.
        tokenizer: of the base.
        path: the file.
        dtype: float32, float16, bfloat16 or q8_0, of the matrices.
        progress: called with the bytes of each tensor that is written.
        keys: further ones, with their texts.
    """
    gguf = import_gguf()
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_type("model")
    _add_texts(writer, keys)
    writer.add_file_type(_FILE_TYPES[dtype])
    if dtype == "q8_0":
        writer.add_quantization_version(_QUANTIZATION_VERSION)
    _add_config(writer, weights)
    _add_tokenizer(writer, tokenizer, weights.config.vocab_size)
    for name, shape in weights.shapes.items():
        kind = "float32" if len(shape) == 1 else dtype
        raw_type = gguf.GGMLQuantizationType(TENSOR_TYPES[kind].number)
        writer.add_tensor_info(
            gguf_name(name), shape, np.dtype(np.float32), TENSOR_TYPES[kind].num_bytes(shape.numel()), raw_type
        )
    with _writing(path):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, weight in weights:
            array = _encode(weight, "float32" if weight.ndim == 1 else dtype, name)
            writer.write_tensor_data(array)
            progress(array.nbytes)
        writer.close()


def check_gguf_base(weights: ModelWeights, tokenizer: PreTrainedTokenizerBase, dtype: str = "float32") -> None:
    """Refuse a base that llama.cpp's phi2 computes or tokenizes otherwise than transformers.

    Raises:
        InputError: names the setting.
    """
    config = weights.config
    rope, width = weights.rope, config.hidden_size
    problem = None
    if config.hidden_act not in _GELU:
        problem = f"its hidden_act is {config.hidden_act!r}, and llama.cpp's phi2 computes gelu_new"
    elif rope["rope_type"] != "default":
        problem = f"its rope_type is {rope['rope_type']!r}; only 'default' is supported"
    elif weights.head_dim * config.num_attention_heads != width:
        problem = f"its heads are {weights.head_dim} wide; expected hidden_size / num_attention_heads"
    elif (reason := _tokenizer_problem(tokenizer)) is not None:
        problem = reason
    elif dtype == "q8_0" and (width % _Q8_0_BLOCK or config.intermediate_size % _Q8_0_BLOCK):
        problem = f"q8_0 needs widths divisible by {_Q8_0_BLOCK}, and it is {width} and {config.intermediate_size} wide"
    if problem:
        raise InputError(
            f"--format gguf and gguf-merged: this base cannot run in llama.cpp: {problem}. Use --format peft or merged."
        )


def import_gguf() -> Any:
    """The package gguf, which writes the files.

    Raises:
        InputError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise InputError("--format gguf and gguf-merged need the package gguf: pip install gguf") from error
    return gguf


def modelfile(model: str, adapter: str | None, template: str, stops: list[str], comment: str) -> str:
    """Ollama's Modelfile."""
    lines = [f"# {line}" for line in comment.splitlines()] + [f"FROM {model}"]
    lines += [f"ADAPTER {adapter}"] if adapter else []
    lines += [f'TEMPLATE """{template}"""', "PARAMETER temperature 0"]
    lines += [f"PARAMETER stop {json.dumps(stop)}" for stop in stops]
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Name the file and the likely cause: numpy, which writes the data, says neither."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, or it cannot be written", str(path)) from error


def _encode(weight: Tensor, dtype: str, name: str) -> np.ndarray[Any, Any]:
    """The bytes of a tensor in the file."""
    if dtype != "q8_0":
        rounded = round_to(weight, getattr(torch, dtype), name)
        return rounded.reshape(-1).view(torch.uint8).numpy()
    gguf = import_gguf()
    kind = gguf.GGMLQuantizationType.Q8_0
    chunks = [gguf.quants.quantize(rows.float().numpy(), kind) for rows in weight.split(_ROWS)]
    return np.concatenate(chunks)


def _add_texts(writer: Any, keys: Mapping[str, str]) -> None:
    for key, text in keys.items():
        writer.add_string(key, text)


def _add_config(writer: Any, weights: ModelWeights) -> None:
    config = weights.config
    writer.add_name(PurePath(weights.base.name).name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_rope_dimension_count(int(weights.head_dim * weights.rope["partial_rotary_factor"]))
    writer.add_rope_freq_base(weights.rope["rope_theta"])


def _add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, num_rows: int) -> None:
    """The vocabulary in the order of the embedding's rows; rows without a token are unused tokens."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens, types = [f"[PAD{row}]" for row in range(num_rows)], [_UNUSED] * num_rows
    for token, row in definition["model"]["vocab"].items():
        tokens[row], types[row] = token, _NORMAL
    for added in definition["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("phi-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in definition["model"]["merges"]])
    eos = tokenizer.eos_token_id
    writer.add_bos_token_id(eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id)
    writer.add_eos_token_id(eos)
    writer.add_unk_token_id(eos if tokenizer.unk_token_id is None else tokenizer.unk_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(chat_template())


def _tokenizer_problem(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why llama.cpp's tokenizer for Phi-2, which is GPT-2's, would give other tokens; None if it gives the same."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    model, splitter = definition["model"], definition["pre_tokenizer"] or {}
    if model["type"] != "BPE" or model.get("byte_fallback") or model.get("ignore_merges"):
        return "its tokenizer is no byte-level BPE as GPT-2's"
    plain = splitter.get("type") == "ByteLevel" and splitter.get("use_regex", True)
    if not plain or splitter.get("add_prefix_space") or definition["normalizer"]:
        return (
            "its tokenizer splits a text before its merges otherwise than GPT-2's, and llama.cpp has no splitter of "
            "that kind, so it would read other tokens than the model was trained on"
        )
    return None
