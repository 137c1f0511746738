"""Overflow: where a forward pass first gives a number that is not finite, and for which record.

    Batch -> the same forward pass, watched -> "the residual sum after model.layers.3 ..., first for a.jsonl:17"

It is run again only after a loss or a gradient was not finite: looking at every output costs a pass over it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_phi2.errors import NonFiniteError
from lit_phi2.model.loss import Loss
from lit_phi2.model.phi2 import FusedPhiForCausalLM, packed_forward
from lit_phi2.types import IGNORE_INDEX, Batch

Found = tuple[str, Tensor]  # where, and (N,) bool: the tokens whose values are not finite


def describe_overflow(phi: FusedPhiForCausalLM, batches: Sequence[Batch]) -> str | None:
    """Where the forward pass of some batches first leaves the range of its dtype, as a sentence; None if it does not.

    Args:
        phi: with or without adapters in its layers, in the mode in which the batches were computed.
        batches: on the device of the model. No text of their records is shown.
    """
    dtype = phi.model.embed_tokens.weight.dtype
    for batch in batches:
        found = find_overflow(phi, batch)
        if found is None:
            continue
        where, is_token = found
        names = ", ".join(locations(batch, is_token)) or "the padding of a row"
        limit = f"{torch.finfo(dtype).max:{',.0f' if dtype == torch.float16 else '.1e'}}"
        cure = " Set model.dtype to float32, or to bfloat16 where the device has it." * (dtype == torch.float16)
        name = str(dtype).removeprefix("torch.")
        return f"{name} overflows: {where} is beyond {limit} or not a number, first for {names}.{cure}"
    return None


def check_range(phi: FusedPhiForCausalLM, batch: Batch, loss: Loss) -> Loss:
    """The loss of an evaluated batch. One that is not finite in float16 would be finite in another dtype.

    Raises:
        NonFiniteError: names where it overflows, and the record.
    """
    if phi.model.embed_tokens.weight.dtype == torch.float16 and not loss.nats.isfinite():
        records = f"The records: {', '.join(batch.locations)}"
        raise NonFiniteError(f"the loss is {loss.nats.item()}. {describe_overflow(phi, [batch]) or records}")
    return loss


def find_overflow(phi: FusedPhiForCausalLM, batch: Batch) -> Found | None:
    """The first output that is not finite, in the order of the computation, and its tokens."""
    found: list[Found] = []

    def look(where: str, values: Tensor) -> None:
        is_token = ~values.detach().isfinite().flatten(1).all(1)
        if not found and is_token.any():
            found.append((where, is_token))

    torch.manual_seed(batch.seed)  # the same dropout
    with torch.no_grad(), _watched(phi, look):
        packed_forward(phi, batch.input_ids, batch.position_ids)
    return found[0] if found else None


@contextmanager
def _watched(phi: FusedPhiForCausalLM, look: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call look with every value between two layers, as it is computed."""
    blocks: Any = phi.model.layers

    def before(module: nn.Module, inputs: tuple[Tensor, ...], where: str) -> None:
        look(where, inputs[0])

    def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, where: str) -> None:
        look(where, output)

    handles = []
    norms = [*(block.input_layernorm for block in blocks), phi.model.final_layernorm]
    for index, norm in enumerate(norms):
        source = f"the residual sum after model.layers.{index - 1}" if index else "the embedding of a token"
        handles.append(norm.register_forward_pre_hook(partial(before, where=source)))
        handles.append(norm.register_forward_hook(partial(after, where=f"the layer norm after {source}")))
    for index, block in enumerate(blocks):
        attn, mlp, place = block.self_attn, block.mlp, f"model.layers.{index}"
        handles.append(attn.dense.register_forward_pre_hook(partial(before, where=f"attention in {place}")))
        for name, layer in (("Wqkv", attn.Wqkv), ("dense", attn.dense), ("fc1", mlp.fc1), ("fc2", mlp.fc2)):
            handles.append(layer.register_forward_hook(partial(after, where=f"{name} in {place}")))
        handles.append(mlp.activation_fn.register_forward_hook(partial(after, where=f"the activation in {place}")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def locations(batch: Batch, is_token: Tensor) -> list[str]:
    """The records of some tokens, as `path:line`.

    Args:
        batch: as it was computed; the examples of its rows are those of batch.locations, in their order.
        is_token: (B T,) bool.

    >>> positions, labels = torch.tensor([[0, 1, 2, 0, 1, 0]]), torch.tensor([[-100, 7, 8, -100, 9, -100]])
    >>> batch = Batch(labels, positions, labels, [], num_tokens=5, supervised_tokens=3, locations=["a:1", "a:2"])
    >>> locations(batch, torch.tensor([False, False, False, False, True, True]))
    ['a:2']
    """
    # A row is its examples, which have labels, and paddings, which have none.
    flat = batch.position_ids.flatten()
    example = (flat == 0).cumsum(0) - 1
    has_label = torch.zeros(int(example[-1]) + 1, dtype=torch.bool, device=flat.device)
    has_label[example[batch.labels.flatten() != IGNORE_INDEX]] = True
    number = has_label.cumsum(0) - 1  # of the record, where there is one
    hit = torch.unique(example[is_token.to(flat.device)])
    return [batch.locations[index] for index in number[hit][has_label[hit]].tolist()]
