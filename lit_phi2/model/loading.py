"""Loading: the weights of an ordinary Phi checkpoint, streamed into the fused model.

    q_proj.weight, k_proj.weight, v_proj.weight, each (D, D)  ->  rows of Wqkv.weight (3 D, D); everything else by name

Rows are copied and nothing is computed, so the fused model is exactly the checkpoint's. A checkpoint of Phi-2's
original code, with `transformer.h.N.mixer.Wqkv`, is read under transformers' names (`original_code.py`).
"""

import logging
from collections.abc import Iterator

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding

from lit_phi2.base_config import CONFIG_FILE, make_phi_config
from lit_phi2.base_digest import check_unchanged
from lit_phi2.errors import InputError
from lit_phi2.model.linear import FrozenLinear
from lit_phi2.model.phi2 import FusedPhiForCausalLM
from lit_phi2.model.quantization import Int8Linear, quantize_into, use_int8
from lit_phi2.original_code import convert_name
from lit_phi2.pretrained import BaseModel, read_model_config

log = logging.getLogger(__name__)

_WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")  # as safetensors names them; integers would need a scale


def load_phi2(base: BaseModel, dtype: torch.dtype, *, quantize: bool = False) -> FusedPhiForCausalLM:
    """Load the base on the CPU, in eval mode, with its weights in dtype. Nothing is downloaded.

    Weights are read one tensor at a time, so a float16 Phi-2 of 5.6 GB takes 5.6 GB in bfloat16 and never twice that.

    Args:
        base: its files.
        dtype: of all weights, or of those that are not quantized.
        quantize: round the weights of all linear layers to int8 as they are read; Phi-2 takes 2.9 GB.

    Raises:
        InputError: see check_weights; or a file changed since the base was found.
    """
    check_weights(base)
    _ = base.digest  # of the files that are read here: a checkpoint written hours later must not see newer ones
    model = empty_phi2(base)
    config = model.config
    config.dtype = dtype
    nn.Module.to(model, dtype)
    if quantize:
        for layer in frozen_linears(model).values():
            use_int8(layer)
        model.get_submodule("lm_head").grad_terms = 2  # type: ignore[assignment]  # torch takes it for a module
    model.to_empty(device="cpu")
    model.model.rotary_emb = PhiRotaryEmbedding(config)  # its frequencies are computed, not saved
    if any(convert_name(name) != name for file in base.weight_files for name, _, _ in _read_header(base, file)):
        log.info("base %s has the names of Phi-2's original code; it is converted while it is read", base.name)
    views = dict(hf_parameter_views(model))
    scales = dict(_scale_views(model))
    for name, weight in iter_weights(base):
        if name in scales:
            quantize_into(weight, views[name], scales[name])
        else:
            views[name].copy_(weight)
    check_unchanged(base.folder, base.files)
    return model.eval()


def frozen_linears(model: nn.Module) -> dict[str, FrozenLinear]:
    """The linear layers of a model by their names."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, FrozenLinear)}


def _scale_views(model: FusedPhiForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """The scales of each int8 weight by its name in transformers' Phi."""
    for name, layer in frozen_linears(model).items():
        if isinstance(layer, Int8Linear):
            hf_names = _hf_projections(f"{name}.weight")
            yield from zip(hf_names, layer.weight_scale.chunk(len(hf_names)), strict=True)


def empty_phi2(base: BaseModel) -> FusedPhiForCausalLM:
    """The base without memory, on the meta device: names and shapes alone."""
    config = make_phi_config(read_model_config(base))
    with torch.device("meta"):
        return FusedPhiForCausalLM(config)


def check_weights(base: BaseModel) -> None:
    """Compare names, shapes and dtypes in the weight files with config.json, before memory is allocated.

    Raises:
        InputError: a weight is missing, unexpected, there twice, or of another shape, or a file is damaged.
    """
    expected = {name: list(view.shape) for name, view in hf_parameter_views(empty_phi2(base))}
    problems: dict[str, list[str]] = {
        kind: [] for kind in ("missing keys", "repeated keys", "mismatched keys", "integer keys", "unexpected keys")
    }
    seen: set[str] = set()
    for file in base.weight_files:
        for name, shape, dtype in _read_hf_header(base, file):
            if name in seen:
                problems["repeated keys"].append(name)
            elif name not in expected:
                problems["unexpected keys"].append(name)
            elif shape != expected[name]:
                problems["mismatched keys"].append(name)
            elif dtype not in _WEIGHT_DTYPES:
                problems["integer keys"].append(name)
            seen.add(name)
    problems["missing keys"] = [name for name in expected if name not in seen]
    for kind, names in problems.items():
        if names:
            raise InputError(
                f"model.base: the weights in {base.folder} do not match its {CONFIG_FILE}: {kind}, the first of "
                f"{len(names)} is {min(names)}. Download them again."
            )


def hf_parameter_views(model: FusedPhiForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """Each parameter of transformers' Phi by its name there, as a view of the fused model's memory."""
    for name, parameter in model.named_parameters():
        hf_names = _hf_projections(name)
        yield from zip(hf_names, parameter.data.chunk(len(hf_names)), strict=True)


def _hf_projections(name: str) -> list[str]:
    """The parameters of transformers' Phi that one of the fused model holds: three for Wqkv, else one."""
    if ".Wqkv." not in name:
        return [name]
    return [name.replace(".Wqkv.", f".{projection}_proj.") for projection in "qkv"]


def _read_header(base: BaseModel, file: str) -> list[tuple[str, list[int], str]]:
    """Name, shape and dtype of each tensor in a file."""
    try:
        with safe_open(base.folder / file, "pt") as weights:
            slices = [(name, weights.get_slice(name)) for name in weights.keys()]  # noqa: SIM118  not a dict
            return [(name, item.get_shape(), item.get_dtype()) for name, item in slices]
    except (OSError, RuntimeError, SafetensorError) as error:
        raise _unreadable(base, file, error) from error


def _read_hf_header(base: BaseModel, file: str) -> list[tuple[str, list[int], str]]:
    """The same by transformers' names, with a Wqkv of the original code in three."""
    return [
        (hf_name, [shape[0] // len(hf_names), *shape[1:]] if len(hf_names) > 1 else shape, dtype)
        for name, shape, dtype in _read_header(base, file)
        for hf_names in [_hf_names(name, shape)]
        for hf_name in hf_names
    ]


def _hf_names(name: str, shape: list[int]) -> list[str]:
    """The parameters of transformers' Phi that a tensor holds, one after the other: three for Wqkv, else one."""
    hf_name = convert_name(name)
    if hf_name == name or ".Wqkv." not in hf_name or not shape or shape[0] % 3:
        return [hf_name]
    return _hf_projections(hf_name)


def iter_weights(base: BaseModel, prefix: str | tuple[str, ...] = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint by transformers' names, one at a time, each mapped from its file until released.

    Args:
        base: its files.
        prefix: of the names; one of several.
    """
    for file in base.weight_files:
        for name, shape, _ in _read_header(base, file):
            hf_names = _hf_names(name, shape)
            if not hf_names[0].startswith(prefix):
                continue
            try:
                # Opened for each tensor: what was read stays in memory until the file is closed.
                with safe_open(base.folder / file, "pt") as weights:
                    weight = weights.get_tensor(name)
            except (OSError, RuntimeError, SafetensorError) as error:
                raise _unreadable(base, file, error) from error
            yield from zip(hf_names, weight.chunk(len(hf_names)) if len(hf_names) > 1 else [weight], strict=True)


def read_weight(base: BaseModel, layer: str) -> Tensor:
    """(out, in): the weight of a linear layer of the fused model, as it is in the files."""
    names = _hf_projections(f"{layer}.weight")
    found = dict(iter_weights(base, tuple(names)))
    return torch.cat([found[name] for name in names]) if len(names) > 1 else found[names[0]]


def _unreadable(base: BaseModel, file: str, error: Exception) -> InputError:
    return InputError(f"model.base: the weights in {base.folder / file} cannot be read ({error}). Download them again.")


def linear_layers(base: BaseModel) -> dict[str, int]:
    """Name of each linear layer of a block -> number of blocks that have it, without loading the base."""
    blocks = empty_phi2(base).model.layers
    layers = [name.rpartition(".")[2] for name, module in blocks.named_modules() if isinstance(module, nn.Linear)]
    return {name: layers.count(name) for name in layers}


def num_parameters(base: BaseModel) -> int:
    """Parameters of the base, without loading it."""
    return sum(parameter.numel() for parameter in empty_phi2(base).parameters())
