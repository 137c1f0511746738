"""LoRA: which layers of Phi-2 get an adapter, and the layer that computes it.

    y = W x + scale B A x        W frozen in the compute dtype; A (r, in) and B (out, r) trained in float32

PEFT's own layer casts its whole input to float32 on every call, which halves the speed of training on a CPU.
FusedLoraLinear subclasses it and replaces its forward, so names, state dict, merging and saving stay PEFT's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lit_phi2.errors import InputError
from lit_phi2.model.kernels import gelu, gelu_and_slope
from lit_phi2.model.linear import FrozenLinear, frozen_matmul
from lit_phi2.model.phi2 import FusedPhiForCausalLM
from lit_phi2.model.quantization import Int8Linear

QKV_PROJECTIONS = ("q_proj", "k_proj", "v_proj")  # transformers' names, in the order of the rows of Wqkv


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """The settings that decide the weights and the meaning of an adapter."""

    lora_r: int
    lora_alpha: int
    target_modules: tuple[str, ...]
    use_rslora: bool = False

    @property
    def scale(self) -> float:
        """What B A is multiplied by: alpha / rank (Hu et al. 2021, arXiv:2106.09685, sec. 4.1).

        With use_rslora it is alpha / sqrt(rank), so that a large rank learns as fast (Kalajdzievski 2023,
        arXiv:2312.03732).
        """
        return self.lora_alpha / (math.sqrt(self.lora_r) if self.use_rslora else self.lora_r)


def add_lora(model: FusedPhiForCausalLM, settings: LoraSettings, *, dropout: float) -> PeftModel:
    """Freeze the base and add a float32 adapter to every target. B starts at zero, so the output does not change."""
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=dropout,
        target_modules=list(settings.target_modules),
        use_rslora=settings.use_rslora,
        task_type="CAUSAL_LM",
    )
    phi = get_peft_model(model, config)
    use_fused_lora(phi)
    return phi


def use_fused_lora(model: nn.Module) -> None:
    """Make every plain LoRA of an ordinary floating-point linear layer a FusedLoraLinear; others stay PEFT's own."""
    for module in model.modules():
        if type(module) is not LoraLinear or module.lora_variant:
            continue
        base: Any = module.base_layer
        if module.fan_in_fan_out or any(module.lora_bias.values()) or base.weight.requires_grad:
            continue
        if isinstance(base, Int8Linear):
            module.__class__ = FusedLoraLinear
        elif type(base) in (nn.Linear, FrozenLinear) and base.weight.is_floating_point():
            base.__class__ = FrozenLinear  # the same parameters
            module.__class__ = FusedLoraLinear


class FusedLoraLinear(LoraLinear):
    """PEFT's LoRA of a linear layer, with forward and backward in one autograd function."""

    @property
    def applies_gelu(self) -> bool:
        """Whether GELU should be applied inside: in 8 bits, which are for memory; without, a step is faster."""
        return isinstance(self.base_layer, Int8Linear)

    def forward(self, x: Tensor, *args: Any, after_gelu: bool = False, **kwargs: Any) -> Tensor:
        """(..., in) -> (..., out), in the dtype of x.

        Args:
            x: (..., in).
            after_gelu: apply GELU to x first. Backward keeps x alone, and computes GELU again.
        """
        if args or kwargs or self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            result: Tensor = super().forward(gelu(x) if after_gelu else x, *args, **kwargs)
            return result
        name = self.active_adapters[0]
        drop = self.lora_dropout[name]  # Identity where there is none
        dropout = float(drop.p) if self.training and isinstance(drop, nn.Dropout) else 0.0
        flat, dropout_mask = x.reshape(-1, x.shape[-1]), None
        if dropout:  # drawn outside the autograd function, so that activation checkpointing draws the same mask again
            dropout_mask = torch.empty_like(flat, dtype=torch.bool).bernoulli_(1 - dropout)
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        scales = self.scaling[name], 1 / (1 - dropout)
        output: Tensor = _FusedLoraFn.apply(flat, self.base_layer, a, b, dropout_mask, *scales, after_gelu)
        return output.view(*x.shape[:-1], -1)


class LoraUpdate(NamedTuple):
    """scale B A, what LoRA adds to a weight: A (r, in), B (out, r)."""

    a: Tensor
    b: Tensor
    scale: float


def lora_updates(layer: nn.Module) -> list[LoraUpdate]:
    """The updates that a layer adds at present: none where it has no adapter, or a disabled or merged one."""
    if not isinstance(layer, FusedLoraLinear) or layer.disable_adapters or layer.merged:
        return []
    lora: Any = layer  # torch takes every attribute of a module for a Tensor or a module
    return [
        LoraUpdate(lora.lora_A[name].weight.detach(), lora.lora_B[name].weight.detach(), float(lora.scaling[name]))
        for name in lora.active_adapters
    ]


class _FusedLoraFn(torch.autograd.Function):
    """W x + bias + scaling B A dropout(x), (N, in) -> (N, out), where x is the input or its GELU.

    Saved for backward: the input, A x (r wide) and the dropout mask. The gradients of A and B are float32, as A and B
    are.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        base: FrozenLinear,
        a: Tensor,
        b: Tensor,
        dropout_mask: Tensor | None,
        scaling: float,
        dropout_scale: float,
        after_gelu: bool,
    ) -> Tensor:
        x = gelu_and_slope(input, only_value=True)[0] if after_gelu else input
        dropped_x = x if dropout_mask is None else (x * dropout_mask).mul_(dropout_scale)
        lora_x = frozen_matmul(dropped_x, a.to(x.dtype).t())
        ctx.save_for_backward(input, lora_x, a, b, dropout_mask)
        ctx.base, ctx.scaling, ctx.dropout_scale, ctx.after_gelu = base, scaling, dropout_scale, after_gelu
        return base.matmul(x, lora_x=lora_x, lora_b=b.t(), scale=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, lora_x, a, b, dropout_mask = ctx.saved_tensors
        x, slope = gelu_and_slope(input) if ctx.after_gelu else (input, None)
        grad_lora_x = frozen_matmul(grad, b.to(grad.dtype)).mul_(ctx.scaling)
        dropped_x = x if dropout_mask is None else (x * dropout_mask).mul_(ctx.dropout_scale)
        grad_a = frozen_matmul(grad_lora_x.t(), dropped_x).to(a.dtype) if ctx.needs_input_grad[2] else None
        # Computed as B's transpose, so that the gradient of the output is multiplied in its own memory layout.
        grad_b = frozen_matmul(lora_x.t(), grad).t().to(b.dtype).mul_(ctx.scaling) if ctx.needs_input_grad[3] else None
        grad_x = None
        if ctx.needs_input_grad[0] and dropout_mask is None:
            grad_x = ctx.base.matmul_t(grad, lora_x=grad_lora_x, lora_b=a)
        elif ctx.needs_input_grad[0]:
            lora_grad_x = frozen_matmul(grad_lora_x, a.to(grad.dtype)).mul_(ctx.dropout_scale).mul_(dropout_mask)
            grad_x = ctx.base.matmul_t(grad).add_(lora_grad_x)
        if grad_x is not None and slope is not None:
            grad_x.mul_(slope)
        return grad_x, None, grad_a, grad_b, None, None, None, None


def check_targets(targets: Sequence[str], available: Mapping[str, int], num_layers: int) -> None:
    """Refuse a target that PEFT would ignore or apply to some blocks only.

    Args:
        targets: model.target_modules.
        available: name of each linear layer of a block -> number of blocks that have it.
        num_layers: number of blocks.

    Raises:
        InputError: a target matches no linear layer, or not the same number in each block.
    """
    names = ", ".join(available)
    if not targets:
        raise InputError(f"model.target_modules: is empty; a block has the linear layers {names}.")
    for target in targets:
        if available.get(target, 0) % num_layers or not available.get(target):
            hint = " q, k and v are one layer here: name Wqkv." if target in QKV_PROJECTIONS else ""
            raise InputError(
                f"model.target_modules: {target!r} names no linear layer of this base; a block has {names}.{hint}"
            )
    if len(set(targets)) < len(targets):
        raise InputError(f"model.target_modules: {list(targets)} names a layer twice.")


def trainable_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """The parameters that LoRA trains, by the names that PEFT gives them on disk."""
    return {
        name.replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def gradients(model: PeftModel) -> list[Tensor]:
    """The gradients of the adapter, without those that are None."""
    return [parameter.grad for parameter in trainable_parameters(model).values() if parameter.grad is not None]


def adapter_state_dict(model: PeftModel) -> dict[str, Tensor]:
    """A copy of the adapter's weights on the CPU."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in trainable_parameters(model).items()}


def load_adapter_state_dict(model: PeftModel, weights: Mapping[str, Tensor], *, source: str) -> None:
    """Copy an adapter's weights into the model.

    Args:
        model: with an adapter of the same settings.
        weights: by the names that PEFT gives them on disk.
        source: where the weights come from, for messages.

    Raises:
        InputError: a weight is missing, unexpected or of another shape; names the first.
    """
    check_adapter_state_dict(model, weights, source=source)
    with torch.no_grad():
        for name, parameter in trainable_parameters(model).items():
            parameter.copy_(weights[name])


def check_adapter_state_dict(model: PeftModel, weights: Mapping[str, Tensor], *, source: str) -> None:
    """Compare the names, shapes and dtypes of an adapter's weights with a model, which may be on the meta device.

    Args:
        model: with an adapter of the same settings.
        weights: by the names that PEFT gives them on disk.
        source: where the weights come from, for messages.

    Raises:
        InputError: a weight is missing, unexpected or of another shape or kind; names the first.
    """
    parameters = trainable_parameters(model)
    for name in [*parameters, *weights]:
        if name not in weights:
            raise InputError(f"{source}: has no weight {name!r}, which this adapter needs.")
        if name not in parameters:
            raise InputError(f"{source}: has a weight {name!r} that this adapter does not have.")
        shape, expected = tuple(weights[name].shape), tuple(parameters[name].shape)
        if shape != expected:
            raise InputError(f"{source}: weight {name!r} has shape {shape}; expected {expected}.")
        if not weights[name].is_floating_point():
            raise InputError(f"{source}: weight {name!r} is {weights[name].dtype}; expected floating-point numbers.")
