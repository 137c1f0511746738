"""LoRA: which layers of Phi-2 get an adapter, and the adapter as a value that can be saved and loaded.

    W x + (alpha / r) B A x        W frozen in the compute dtype; A (r, in) and B (out, r) trained in float32

Inside a run an adapter names `Wqkv`. On disk it is in plain PEFT form for transformers' own Phi, which anyone can load:
A is shared by q_proj, k_proj and v_proj, and the rows of B are split in three. That is exact in both directions.

LoRA scales by alpha / rank (Hu et al. 2021, arXiv:2106.09685, sec. 4.1).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lit_phi2.base import Base
from lit_phi2.batch import TEMPLATE_VERSION
from lit_phi2.errors import InputError
from lit_phi2.files import digest, replace_file
from lit_phi2.model.phi2 import FusedPhiForCausalLM
from lit_phi2.model.products import FrozenLinear, times

CONFIG_FILE = "adapter_config.json"  # PEFT's names
WEIGHTS_FILE = "adapter_model.safetensors"
IDENTITY_FILE = "lit_phi2.json"
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, slots=True)
class LoraShape:
    """What decides the shape and meaning of an adapter."""

    lora_r: int
    lora_alpha: int
    target_modules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Adapter:
    """A trained adapter and what it was trained on.

    Attributes:
        weights: float32, by PEFT's names, with Wqkv fused.
        shape: rank, alpha and targets.
        base: base, base_revision and base_digest; the digest is empty where it is not known.
        template_version: of the prompts it learned; 0 where it is not known.
    """

    weights: dict[str, Tensor]
    shape: LoraShape
    base: dict[str, str]
    template_version: int


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
            hint = " q, k and v are one layer here: name Wqkv." if target in _PROJECTIONS else ""
            raise InputError(
                f"model.target_modules: {target!r} names no linear layer of this base; a block has {listed}.{hint}"
            )
    if len(set(targets)) < len(targets):
        raise InputError(f"model.target_modules: {list(targets)} names a layer twice.")


def check_adapter(adapter: Adapter, shape: LoraShape, base: Base, *, source: str) -> None:
    """Refuse an adapter of another shape, base or template than the run's.

    Raises:
        InputError: names the first difference, with both values.
    """
    for name in ("lora_r", "lora_alpha", "target_modules"):
        found, expected = getattr(adapter.shape, name), getattr(shape, name)
        if found != expected and (name != "target_modules" or set(found) != set(expected)):
            raise InputError(f"{source}: has {name} {found}, but model.{name} is {expected}; make them equal.")
    digest = adapter.base["base_digest"]
    if digest and digest != base.digest:
        raise InputError(
            f"{source}: was trained on {adapter.base['base']!r} (digest {digest}), but model.base is {base.name!r} "
            f"(digest {base.digest}). Give its own base with --model.base."
        )
    if adapter.template_version not in (0, TEMPLATE_VERSION):
        raise InputError(
            f"{source}: learned prompts of template {adapter.template_version}; this lit_phi2 has {TEMPLATE_VERSION}."
        )


class FusedLora(LoraLinear):
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
        output: Tensor = _LoraLinear.apply(flat, base.weight, base.bias, a, b, keep, scaling, grow)
        return output.view(*x.shape[:-1], -1)


class _LoraLinear(torch.autograd.Function):
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
        low = times(x if keep is None else (x * keep).mul_(grow), a.to(x.dtype).t())
        ctx.save_for_backward(x, low, weight, a, b, keep)
        ctx.scaling, ctx.grow = scaling, grow
        return times(x, weight.t(), bias=bias, low=low, up=b.t(), scale=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, weight, a, b, keep = ctx.saved_tensors
        grad_low = times(grad, b.to(grad.dtype)).mul_(ctx.scaling)
        dropped = x if keep is None else (x * keep).mul_(ctx.grow)
        grad_a = times(grad_low.t(), dropped).to(a.dtype) if ctx.needs_input_grad[3] else None
        # B's transposed: laid out as it is, the gradient of the output need not be turned for the product.
        grad_b = times(low.t(), grad).t().to(b.dtype).mul_(ctx.scaling) if ctx.needs_input_grad[4] else None
        grad_x = None
        if ctx.needs_input_grad[0] and keep is None:
            grad_x = times(grad, weight, low=grad_low, up=a)
        elif ctx.needs_input_grad[0]:
            grad_x = times(grad, weight).add_(times(grad_low, a.to(grad.dtype)).mul_(ctx.grow).mul_(keep))
        return grad_x, None, None, grad_a, grad_b, None, None, None


def add_lora(model: FusedPhiForCausalLM, shape: LoraShape, *, dropout: float) -> PeftModel:
    """Freeze the base and put a fresh float32 adapter on every target; it changes nothing until it is trained."""
    config = LoraConfig(
        r=shape.lora_r,
        lora_alpha=shape.lora_alpha,
        lora_dropout=dropout,
        target_modules=list(shape.target_modules),
        task_type="CAUSAL_LM",
    )
    phi = get_peft_model(model, config)
    fuse_lora(phi)
    return phi


def fuse_lora(model: nn.Module) -> None:
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
            module.__class__ = FusedLora


def trained_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """The parameters that LoRA trains, by the names that PEFT gives them on disk."""
    return {
        name.replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def adapter_weights(model: PeftModel) -> dict[str, Tensor]:
    """A copy of the adapter's weights on the CPU."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in trained_parameters(model).items()}


def load_weights(model: PeftModel, weights: Mapping[str, Tensor], *, source: str) -> None:
    """Copy an adapter's weights into the model.

    Raises:
        InputError: a weight is missing, left over, or of another shape; names the first.
    """
    parameters = trained_parameters(model)
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


def save_adapter(adapter: Adapter, folder: Path) -> None:
    """Write an adapter in plain PEFT form for transformers' own Phi, each file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    targets = [
        native
        for target in adapter.shape.target_modules
        for native in (_PROJECTIONS if target == "Wqkv" else (target,))
    ]
    config = LoraConfig(
        r=adapter.shape.lora_r,
        lora_alpha=adapter.shape.lora_alpha,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=adapter.base["base"],
        inference_mode=True,
    ).to_dict()
    config["target_modules"] = targets  # PEFT holds a set, whose order changes from run to run
    native = to_native(adapter.weights)
    identity = {**adapter.base, **asdict(adapter.shape), "template_version": adapter.template_version}
    identity["weights_digest"] = _weights_digest(native)
    replace_file(folder / WEIGHTS_FILE, save(native, {"format": "pt"}))
    replace_file(folder / CONFIG_FILE, json.dumps(config, indent=2, default=str) + "\n")
    replace_file(folder / IDENTITY_FILE, json.dumps(identity, indent=2) + "\n")


def read_adapter(path: Path) -> Adapter:
    """The adapter in a checkpoint (.ckpt) or in a folder in PEFT form.

    Raises:
        InputError: not such a file or folder, damaged, or an adapter that the fused model cannot represent.
    """
    return _read_folder(path) if path.is_dir() else read_checkpoint(path)[0]


def read_checkpoint(path: Path) -> tuple[Adapter, dict[str, Any]]:
    """The adapter in a checkpoint, and the whole checkpoint; no code in it is run.

    Raises:
        InputError: not a checkpoint of lit_phi2, or damaged.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        expected = checkpoint.pop("digest")
        adapter = adapter_from_state(checkpoint["lit_phi2"], checkpoint["state_dict"])
        found = digest(checkpoint)
    except Exception as error:  # torch raises many kinds for a damaged or hostile file
        raise InputError(f"{path}: is not a whole checkpoint of lit_phi2 ({type(error).__name__}).") from error
    if found != expected:
        raise InputError(f"{path}: is damaged: its digest is {found[:16]}, but {str(expected)[:16]} was written.")
    return adapter, checkpoint


def adapter_to_state(adapter: Adapter) -> dict[str, Any]:
    """Everything of an adapter but its weights, as plain values."""
    return {
        **adapter.base,
        "lora_r": adapter.shape.lora_r,
        "lora_alpha": adapter.shape.lora_alpha,
        "target_modules": list(adapter.shape.target_modules),
        "template_version": adapter.template_version,
    }


def adapter_from_state(state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Adapter:
    """The inverse of adapter_to_state."""
    return Adapter(
        weights=dict(weights),
        shape=LoraShape(int(state["lora_r"]), int(state["lora_alpha"]), tuple(state["target_modules"])),
        base={key: str(state[key]) for key in ("base", "base_revision", "base_digest")},
        template_version=int(state["template_version"]),
    )


def describe(base: Base, shape: LoraShape, weights: dict[str, Tensor]) -> Adapter:
    """An adapter trained on this base, with today's template."""
    return Adapter(weights, shape, base.identity(), TEMPLATE_VERSION)


def to_native(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fused weights -> those of q_proj, k_proj and v_proj: A three times, B in three parts."""
    native: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if ".Wqkv." not in name:
            native[name] = weight.contiguous()
            continue
        parts = [weight] * 3 if ".lora_A." in name else weight.chunk(3, dim=0)
        for projection, part in zip(_PROJECTIONS, parts, strict=True):
            native[name.replace(".Wqkv.", f".{projection}.")] = part.clone()
    return native


def from_native(weights: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """The inverse of to_native.

    Raises:
        InputError: q, k and v do not share their A, so one fused layer of this rank cannot hold them.
    """
    fused: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if ".q_proj." in name:
            names = [name.replace(".q_proj.", f".{projection}.") for projection in _PROJECTIONS]
            if missing := [name for name in names if name not in weights]:
                raise InputError(f"{source}: adapts q_proj but has no weight {missing[0]!r}.")
            parts = [weights[name] for name in names]
            if ".lora_A." in name and not all(torch.equal(parts[0], part) for part in parts[1:]):
                raise InputError(
                    f"{source}: q_proj, k_proj and v_proj have different A ({name!r}), so they are no Wqkv. Only "
                    "adapters trained on a fused Wqkv can be loaded."
                )
            fused_weight = weight if ".lora_A." in name else torch.cat(parts)
            fused[name.replace(".q_proj.", ".Wqkv.")] = fused_weight
        elif ".k_proj." not in name and ".v_proj." not in name:
            fused[name] = weight
    return fused


def _weights_digest(native: Mapping[str, Tensor]) -> str:
    return digest(dict(sorted(native.items())))


def _read_folder(folder: Path) -> Adapter:
    try:
        config = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
        native = load_file(folder / WEIGHTS_FILE)
        identity_file = folder / IDENTITY_FILE
        identity = json.loads(identity_file.read_text("utf-8")) if identity_file.is_file() else {}
    except Exception as error:  # missing, damaged or not what their names say
        raise InputError(
            f"{folder}: is not a folder with a whole adapter ({CONFIG_FILE}, {WEIGHTS_FILE}): {error}"
        ) from error
    expected = identity.get("weights_digest")  # not in an adapter that others wrote
    if expected not in (None, found := _weights_digest(native)):
        raise InputError(
            f"{folder / WEIGHTS_FILE}: is damaged: its digest is {found[:16]}, {IDENTITY_FILE} tells "
            f"{str(expected)[:16]}. Export it anew."
        )
    plain = {"use_dora": False, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "bias": "none"}
    for key, expected in plain.items():
        if config.get(key, expected) != expected:
            raise InputError(f"{folder / CONFIG_FILE}: {key} is {config[key]!r}; only {expected!r} is supported.")
    targets = [target for target in config["target_modules"] if target not in _PROJECTIONS]
    if any(target in config["target_modules"] for target in _PROJECTIONS):
        targets.insert(0, "Wqkv")
    return Adapter(
        weights=from_native(native, source=str(folder)),
        shape=LoraShape(int(config["r"]), int(config["lora_alpha"]), tuple(identity.get("target_modules", targets))),
        base={
            "base": str(identity.get("base", config["base_model_name_or_path"])),
            "base_revision": str(identity.get("base_revision", "")),
            "base_digest": str(identity.get("base_digest", "")),
        },
        template_version=int(identity.get("template_version", 0)),
    )
