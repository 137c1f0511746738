"""LoRA: which layers of Phi-2 get an adapter, and the adapter as a value that can be saved and loaded.

    W x + (alpha / r) B A x        W frozen in the compute dtype; A (r, in) and B (out, r) trained in float32

Inside a run an adapter names `Wqkv`. On disk it is in plain PEFT form for transformers' own Phi, which anyone can load:
A is shared by q_proj, k_proj and v_proj, and the rows of B are split in three. That is exact in both directions.

LoRA scales by alpha / rank (Hu et al. 2021, arXiv:2106.09685, sec. 4.1).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lit_phi2.errors import InputError
from lit_phi2.model.linear import FrozenLinear, frozen_matmul
from lit_phi2.model.phi2 import FusedPhiForCausalLM

QKV_PROJECTIONS = ("q_proj", "k_proj", "v_proj")  # transformers' own, in the order of the rows of Wqkv


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """What decides the shape and meaning of an adapter."""

    lora_r: int
    lora_alpha: int
    target_modules: tuple[str, ...]


def check_targets(targets: Sequence[str], available: Mapping[str, int], num_layers: int) -> None:
    """Refuse a target that PEFT would ignore or apply to some blocks only.

    Args:
        targets: model.target_modules.
        available: name of each linear layer of a block -> how many blocks have it.
        num_layers: number of blocks.

    Raises:
        InputError: a target matches no linear layer, or not equally many in each block.
    """
    listed = ", ".join(available)
    if not targets:
        raise InputError(f"model.target_modules: is empty; a block has the linear layers {listed}.")
    for target in targets:
        if available.get(target, 0) % num_layers or not available.get(target):
            hint = " q, k and v are one layer here: name Wqkv." if target in QKV_PROJECTIONS else ""
            raise InputError(
                f"model.target_modules: {target!r} names no linear layer of this base; a block has {listed}.{hint}"
            )
    if len(set(targets)) < len(targets):
        raise InputError(f"model.target_modules: {list(targets)} names a layer twice.")


class FusedLoraLinear(LoraLinear):
    """PEFT's LoRA of a linear layer with one custom step forward and back; names, merge and saving stay PEFT's."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) -> (..., out), in the dtype of x."""
        if args or kwargs or self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        name = self.active_adapters[0]
        drop = self.lora_dropout[name]  # Identity where there is none
        dropout = float(drop.p) if self.training and isinstance(drop, nn.Dropout) else 0.0
        flat, keep = x.reshape(-1, x.shape[-1]), None
        if dropout:  # drawn here and not in the function, so that activation checkpointing draws it again alike
            keep = torch.empty_like(flat, dtype=torch.bool).bernoulli_(1 - dropout)
        base = self.base_layer
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        scaling, grow = self.scaling[name], 1 / (1 - dropout)
        output: Tensor = _FusedLoraFn.apply(flat, base.weight, base.bias, a, b, keep, scaling, grow)
        return output.view(*x.shape[:-1], -1)


class _FusedLoraFn(torch.autograd.Function):
    """W x + bias + scaling B A drop(x), (N, in) -> (N, out): products in product_dtype, the update added in place.

    Kept for backward: x, A x (r wide), the mask of dropout. The gradients of A and B are in their own dtype, float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        keep: Tensor | None,
        scaling: float,
        grow: float,
    ) -> Tensor:
        low = frozen_matmul(x if keep is None else (x * keep).mul_(grow), a.to(x.dtype).t())
        ctx.save_for_backward(x, low, weight, a, b, keep)
        ctx.scaling, ctx.grow = scaling, grow
        return frozen_matmul(x, weight.t(), bias=bias, low=low, up=b.t(), scale=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, weight, a, b, keep = ctx.saved_tensors
        grad_low = frozen_matmul(grad, b.to(grad.dtype)).mul_(ctx.scaling)
        dropped = x if keep is None else (x * keep).mul_(ctx.grow)
        grad_a = frozen_matmul(grad_low.t(), dropped).to(a.dtype) if ctx.needs_input_grad[3] else None
        # B's transposed: laid out as it is, the gradient of the output need not be turned for the product.
        grad_b = frozen_matmul(low.t(), grad).t().to(b.dtype).mul_(ctx.scaling) if ctx.needs_input_grad[4] else None
        grad_x = None
        if ctx.needs_input_grad[0] and keep is None:
            grad_x = frozen_matmul(grad, weight, low=grad_low, up=a)
        elif ctx.needs_input_grad[0]:
            grad_x = frozen_matmul(grad, weight).add_(
                frozen_matmul(grad_low, a.to(grad.dtype)).mul_(ctx.grow).mul_(keep)
            )
        return grad_x, None, None, grad_a, grad_b, None, None, None


def add_lora(model: FusedPhiForCausalLM, settings: LoraSettings, *, dropout: float) -> PeftModel:
    """Freeze the base and put a fresh float32 adapter on every target; it changes nothing until it is trained."""
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=dropout,
        target_modules=list(settings.target_modules),
        task_type="CAUSAL_LM",
    )
    phi = get_peft_model(model, config)
    use_fused_lora(phi)
    return phi


def use_fused_lora(model: nn.Module) -> None:
    """Let every plain LoRA of an ordinary floating linear layer compute as FusedLora; all else stays PEFT's own."""
    for module in model.modules():
        if type(module) is not LoraLinear or module.lora_variant:
            continue
        base: Any = module.base_layer
        plain = not module.fan_in_fan_out and not any(module.lora_bias.values())
        if (
            plain
            and type(base) in (nn.Linear, FrozenLinear)
            and base.weight.is_floating_point()
            and not base.weight.requires_grad
        ):
            module.__class__ = FusedLoraLinear


def trainable_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """The parameters that LoRA trains, by the names that PEFT gives them on disk."""
    return {
        name.replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def adapter_state_dict(model: PeftModel) -> dict[str, Tensor]:
    """A copy of the adapter's weights on the CPU."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in trainable_parameters(model).items()}


def load_adapter_state_dict(model: PeftModel, weights: Mapping[str, Tensor], *, source: str) -> None:
    """Copy an adapter's weights into the model.

    Raises:
        InputError: a weight is missing, left over, or of another shape; names the first.
    """
    parameters = trainable_parameters(model)
    for name in [*parameters, *weights]:
        if name not in weights:
            raise InputError(f"{source}: has no weight {name!r}, which this adapter needs.")
        if name not in parameters:
            raise InputError(f"{source}: holds a weight {name!r} that this adapter does not have.")
        found, expected = tuple(weights[name].shape), tuple(parameters[name].shape)
        if found != expected:
            raise InputError(f"{source}: weight {name!r} has shape {found}; expected {expected}.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
