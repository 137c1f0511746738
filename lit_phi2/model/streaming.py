"""Streaming: the base with one block in memory at a time, for a process that must stay small.

    every forward: block 0, block 1, ...  <-  the weights of each, read from the files into the same memory

The numbers are those of `load_phi2`, and Phi-2 takes 0.7 GB. A forward reads all weight files, so prompts should share
one.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding

from lit_phi2.base_digest import check_unchanged
from lit_phi2.model.loading import check_weights, empty_phi2, hf_parameter_views, iter_weights
from lit_phi2.model.phi2 import FusedPhiForCausalLM
from lit_phi2.pretrained import BaseModel

_OUTSIDE_BLOCKS = ("model.embed_tokens.", "model.final_layernorm.", "lm_head.")


def load_streamed_phi2(base: BaseModel, dtype: torch.dtype, device: torch.device) -> FusedPhiForCausalLM:
    """Load all but the blocks, in eval mode, with weights in dtype; each forward reads the blocks.

    Raises:
        InputError: see load_phi2.
    """
    check_weights(base)
    _ = base.digest  # of the files that are read here
    model = empty_phi2(base)
    model.is_streamed = True
    model.config.dtype = dtype
    blocks: Any = model.model.layers
    for module in (model.model.embed_tokens, model.model.final_layernorm, model.lm_head, blocks[0]):
        nn.Module.to(module, dtype).to_empty(device=device)
    model.model.rotary_emb = PhiRotaryEmbedding(model.config).to(device)  # its frequencies are computed, not saved
    for block in blocks[1:]:
        _share_parameters(blocks[0], block)
    views = dict(hf_parameter_views(model))  # a shared parameter has the name that it has in block 0
    for name, weight in iter_weights(base, _OUTSIDE_BLOCKS):
        views[name].copy_(weight)
    for index, block in enumerate(blocks):
        block.input_layernorm.register_forward_pre_hook(partial(_read_block, base, views, index))  # its first layer
    check_unchanged(base.folder, base.files)
    return model.eval()


def _share_parameters(source: nn.Module, target: nn.Module) -> None:
    for path, module in target.named_modules():
        for name, _ in list(module.named_parameters(recurse=False)):
            setattr(module, name, getattr(source.get_submodule(path), name))


def _read_block(base: BaseModel, views: dict[str, Tensor], index: int, *_: Any) -> None:
    prefix = f"model.layers.{index}."
    for name, weight in iter_weights(base, prefix):
        views[f"model.layers.0.{name.removeprefix(prefix)}"].copy_(weight)
