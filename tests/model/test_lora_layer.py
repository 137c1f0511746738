"""FusedLoraLinear: against PEFT's own layer, and under what may be wrapped around it."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lit_phi2.model import linear
from lit_phi2.model.kernels import gelu
from lit_phi2.model.linear import FrozenLinear
from lit_phi2.model.lora import FusedLoraLinear, use_fused_lora


def lora_layer(*, bias: bool, dropout: float, dtype: torch.dtype = torch.float64, fused: bool = True) -> nn.Module:
    """One linear layer with LoRA of rank 3 whose B is not zero."""
    torch.manual_seed(3)
    config = LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(7, 5, bias=bias, dtype=dtype)), config)
    layer = model.base_model.model[0]
    for parameter in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
        parameter.data = torch.randn_like(parameter, dtype=torch.promote_types(dtype, torch.float32))
    if fused:
        use_fused_lora(layer)
        assert type(layer) is FusedLoraLinear
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_lora_passes_gradcheck(bias: bool, dropout: float) -> None:
    layer = lora_layer(bias=bias, dropout=dropout)
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    names = ("lora_A.default.weight", "lora_B.default.weight")

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(5)  # the same mask each time
        return torch.func.functional_call(layer, dict(zip(names, (a, b), strict=True)), (x,))

    weights = [layer.get_parameter(name) for name in names]
    assert torch.autograd.gradcheck(run, (x, *weights))
    assert torch.autograd.gradcheck(lambda a, b: run(x.detach(), a, b), weights)


def test_lora_equals_pefts_own_layer() -> None:
    """Forward and all gradients; with dropout, by putting the mask that was drawn into PEFT's formula by hand."""
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    for dropout in (0.0, 0.5):
        fused, peft = (lora_layer(bias=True, dropout=dropout, fused=fused) for fused in (True, False))
        torch.manual_seed(1)
        output = fused(x)
        torch.manual_seed(1)
        if dropout:
            mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(0.5)
            peft.lora_dropout["default"] = nn.Identity()
            expected = peft.base_layer(x) + peft.lora_B["default"](peft.lora_A["default"](x * mask * 2)) * 2
        else:
            expected = peft(x)
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
        weights = [[layer.lora_A["default"].weight, layer.lora_B["default"].weight] for layer in (fused, peft)]
        gradients = [
            torch.autograd.grad(y.square().sum(), [x, *ab]) for y, ab in zip((output, expected), weights, strict=True)
        ]
        for gradient, expected_gradient in zip(*gradients, strict=True):
            torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gelu_inside_the_layer_is_gelu_before_it(dropout: float) -> None:
    """Outputs and gradients, bit for bit; backward keeps x instead of gelu(x)."""
    layer = lora_layer(bias=True, dropout=dropout, dtype=torch.bfloat16)
    x = torch.randn(2, 3, 7, dtype=torch.bfloat16, requires_grad=True)
    weights = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    outputs, gradients = [], []
    for run in (lambda: layer(gelu(x)), lambda: layer(x, after_gelu=True)):
        torch.manual_seed(5)  # the same mask each time
        outputs.append(run())
        gradients.append(torch.autograd.grad(outputs[-1].float().square().sum(), weights))
    assert torch.equal(*outputs)
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))
    layer.enable_adapters(False)
    assert torch.equal(layer(x, after_gelu=True), layer.base_layer(gelu(x)))


def test_lora_dropout_is_seeded_and_drops_its_fraction() -> None:
    layer = lora_layer(bias=False, dropout=0.3)
    nn.init.zeros_(layer.base_layer.weight)
    nn.init.eye_(layer.lora_A["default"].weight)
    nn.init.eye_(layer.lora_B["default"].weight)
    x = torch.ones(20_000, 7, dtype=torch.float64)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    kept = first[:, :3] != 0
    assert kept.double().mean().item() == pytest.approx(0.7, abs=0.006)  # three standard deviations of 60,000 draws
    torch.testing.assert_close(first[:, :3][kept], torch.full((int(kept.sum()),), 2 / 0.7, dtype=torch.float64))
    layer.eval()
    assert (layer(x)[:, :3] == 2).all()


@pytest.mark.parametrize("emulated", [False, True])
def test_bfloat16_activations_give_float32_gradients(emulated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And are saved as they are: x and A x, both in bfloat16, and nothing else."""
    monkeypatch.setattr(linear, "emulates_bf16", lambda: emulated)
    layer = lora_layer(bias=True, dropout=0.0, dtype=torch.bfloat16)
    saved: list[Tensor] = []
    x = torch.randn(6, 7, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        output = layer(x)
    output.float().sum().backward()
    assert output.dtype == x.grad.dtype == torch.bfloat16
    assert layer.lora_A["default"].weight.grad.dtype == torch.float32
    parameters = {layer.base_layer.weight.data_ptr(), *(p.data_ptr() for p in layer.parameters())}
    activations = [tensor for tensor in saved if tensor.data_ptr() not in parameters]
    lora_x, saved_x = sorted(activations, key=torch.numel)
    assert (lora_x.shape, saved_x.shape, saved_x.dtype) == ((6, 3), (6, 7), torch.bfloat16)
    assert lora_x.dtype == torch.bfloat16


def test_a_fused_layers_base_is_a_frozen_linear() -> None:
    layer = lora_layer(bias=True, dropout=0.0)
    assert type(layer.base_layer) is FrozenLinear


@pytest.mark.parametrize("case", ["dora", "two adapters", "a subclass of Linear", "a trained base", "a LoRA bias"])
def test_other_kinds_of_lora_stay_pefts_own(case: str) -> None:
    class CustomLinear(nn.Linear):
        pass

    kinds = {"dora": {"use_dora": True}, "a LoRA bias": {"lora_bias": True}}
    base = (CustomLinear if case == "a subclass of Linear" else nn.Linear)(7, 5)
    config = LoraConfig(r=3, target_modules=["0"], **kinds.get(case, {}))
    model = get_peft_model(nn.Sequential(base), config)
    layer = model.base_model.model[0]
    layer.base_layer.weight.requires_grad = case == "a trained base"
    use_fused_lora(model)
    if case != "two adapters":
        assert type(layer) is PeftLinear
        return
    model.add_adapter("other", config)
    nn.init.ones_(layer.lora_B["other"].weight)
    layer.set_adapter(["default", "other"])
    x = torch.randn(2, 7)
    update = layer.lora_B["other"](layer.lora_A["other"](x)) * layer.scaling["other"]
    torch.testing.assert_close(layer(x), layer.base_layer(x) + update)  # that of `default` is zero


def test_merging_gives_the_same_output() -> None:
    layer = lora_layer(bias=True, dropout=0.0)
    x = torch.randn(3, 7, dtype=torch.float64)
    expected = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), expected)
    assert layer.merged
    layer.unmerge()
    torch.testing.assert_close(layer(x), expected)


# Wrapped like any other module


def test_activation_checkpointing_draws_the_same_dropout() -> None:
    layer = lora_layer(bias=True, dropout=0.4)
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    weights = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    gradients = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(2)
        gradients.append(torch.autograd.grad(run(x).square().sum(), weights))
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_lora_compiles_without_a_graph_break() -> None:
    """With the eager backend, so that no compiler is needed to test it."""
    layer = lora_layer(bias=True, dropout=0.0, dtype=torch.float32)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 7, requires_grad=True)
    weights = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    gradients = [torch.autograd.grad(run(x).square().sum(), weights) for run in (layer, compiled)]
    for eager, traced in zip(*gradients, strict=True):
        torch.testing.assert_close(eager, traced)


def test_lora_works_under_ddp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of one: hooks, buckets and the reducer are those of many."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        layer = lora_layer(bias=True, dropout=0.0, dtype=torch.float32)
        alone = copy.deepcopy(layer)
        x = torch.randn(5, 7)
        DistributedDataParallel(layer)(x).square().sum().backward()
        alone(x).square().sum().backward()
        for name in ("lora_A", "lora_B"):
            assert torch.equal(getattr(layer, name)["default"].weight.grad, getattr(alone, name)["default"].weight.grad)
    finally:
        dist.destroy_process_group()
