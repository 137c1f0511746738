"""The custom autograd functions: their gradients, and twenty steps against PEFT's and transformers' own layers."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import PhiConfig

from helpers import new_module, relative_difference
from lit_phi2.data.collate import collate
from lit_phi2.model import attention, loss
from lit_phi2.model import kernels as elementwise
from lit_phi2.model import linear as products
from lit_phi2.model.attention import PackedLayout, apply_rotary_emb, block_causal_mask, packed_attention, packed_layout
from lit_phi2.model.lora import FusedLoraLinear, trainable_parameters, use_fused_lora
from lit_phi2.model.loss import causal_lm_loss
from lit_phi2.model.phi2 import FusedPhiForCausalLM, packed_forward
from lit_phi2.pretrained import TINY_PHI_DIR, load_tokenizer, resolve_base_model
from lit_phi2.training.module import LitPhi2
from lit_phi2.types import IGNORE_INDEX, Example, pad_to_multiple

POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0], [0, 1, 2, 3, 0, 0, 0, 1, 2]])
SPANS = [(0, 5), (5, 8), (8, 9), (9, 13), (13, 14), (14, 15), (15, 18)]
LAYOUT = PackedLayout(SPANS)


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


def angles(length: int, pairs: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    turns = torch.arange(length, dtype=dtype)[:, None] / 3 ** torch.arange(1, pairs + 1, dtype=dtype)
    return turns.cos(), turns.sin()


# Each function by itself


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck_of_lora(bias: bool, dropout: float) -> None:
    layer = lora_layer(bias=bias, dropout=dropout)
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    names = ("lora_A.default.weight", "lora_B.default.weight")

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(5)  # the same mask each time
        return torch.func.functional_call(layer, dict(zip(names, (a, b), strict=True)), (x,))

    weights = [layer.get_parameter(name) for name in names]
    assert torch.autograd.gradcheck(run, (x, *weights))
    assert torch.autograd.gradcheck(lambda a, b: run(x.detach(), a, b), weights)


def test_lora_equals_pefts_own_with_and_without_dropout() -> None:
    """Forward and all gradients; with dropout, by putting the mask that was drawn into PEFT's formula by hand."""
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    for dropout in (0.0, 0.5):
        ours, own = (lora_layer(bias=True, dropout=dropout, fused=fused) for fused in (True, False))
        torch.manual_seed(1)
        got = ours(x)
        torch.manual_seed(1)
        if dropout:
            mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(0.5)
            own.lora_dropout["default"] = nn.Identity()
            expected = own.base_layer(x) + own.lora_B["default"](own.lora_A["default"](x * mask * 2)) * 2
        else:
            expected = own(x)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        weights = [[layer.lora_A["default"].weight, layer.lora_B["default"].weight] for layer in (ours, own)]
        gradients = [
            torch.autograd.grad(y.square().sum(), [x, *some]) for y, some in zip((got, expected), weights, strict=True)
        ]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_lora_dropout_comes_from_the_default_generator_and_drops_its_share() -> None:
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
def test_bfloat16_activations_get_float32_gradients_and_are_kept_as_they_are(
    emulated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "EMULATED", emulated)
    layer = lora_layer(bias=True, dropout=0.0, dtype=torch.bfloat16)
    saved: list[Tensor] = []
    x = torch.randn(6, 7, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        output = layer(x)
    output.float().sum().backward()
    assert output.dtype == x.grad.dtype == torch.bfloat16
    assert layer.lora_A["default"].weight.grad.dtype == torch.float32
    frozen = {layer.base_layer.weight.data_ptr(), *(p.data_ptr() for p in layer.parameters())}
    kept = [tensor for tensor in saved if tensor.data_ptr() not in frozen]
    low, own = sorted(kept, key=torch.numel)  # A x, and x itself
    assert (low.shape, own.shape, own.dtype) == ((6, 3), (6, 7), torch.bfloat16)
    assert low.dtype == torch.bfloat16


@pytest.mark.parametrize("what", ["dora", "two adapters", "a subclass of Linear", "a trained base", "a LoRA bias"])
def test_what_is_not_plain_lora_stays_pefts_own(what: str) -> None:
    class Own(nn.Linear):
        pass

    kinds = {"dora": {"use_dora": True}, "a LoRA bias": {"lora_bias": True}}
    linear = (Own if what == "a subclass of Linear" else nn.Linear)(7, 5)
    config = LoraConfig(r=3, target_modules=["0"], **kinds.get(what, {}))
    model = get_peft_model(nn.Sequential(linear), config)
    layer = model.base_model.model[0]
    layer.base_layer.weight.requires_grad = what == "a trained base"
    use_fused_lora(model)
    if what != "two adapters":
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
    before = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), before)
    assert layer.merged
    layer.unmerge()
    torch.testing.assert_close(layer(x), before)


def test_spans_are_cut_where_positions_restart() -> None:
    assert packed_layout(POSITIONS).spans == SPANS


@pytest.mark.parametrize("queries", [2, 256])
def test_gradcheck_of_attention(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "QUERIES", queries)
    qkv = torch.randn(18, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    cos, sin = angles(18, 2)
    assert torch.autograd.gradcheck(lambda qkv: packed_attention(qkv, cos, sin, LAYOUT, scaling=0.4), (qkv,))


def test_attention_equals_masked_attention_over_all_tokens() -> None:
    """Reference: one softmax over all pairs, with everything but the own example's past masked by hand."""
    qkv = torch.randn(18, 3, 2, 6, dtype=torch.float64)
    cos, sin = angles(18, 2)
    query, key = apply_rotary_emb(qkv[:, :2], cos, sin).unbind(1)
    example = torch.tensor([n for n, (start, end) in enumerate(SPANS) for _ in range(start, end)])
    seen = (example[:, None] == example) & torch.ones(18, 18, dtype=torch.bool).tril()
    scores = torch.einsum("qhd,khd->hqk", query, key) * 0.4
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    expected = torch.einsum("hqk,khd->qhd", weights, qkv[:, 2])
    torch.testing.assert_close(packed_attention(qkv, cos, sin, LAYOUT, scaling=0.4), expected, rtol=1e-12, atol=1e-12)


def test_attention_by_a_mask_over_rows_equals_attention_by_example() -> None:
    """The way of MPS, here on the CPU."""
    qkv = torch.randn(18, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    cos, sin = angles(18, 2)
    results = [
        packed_attention(qkv, cos, sin, layout, scaling=0.4)
        for layout in (LAYOUT, PackedLayout(SPANS, seen=block_causal_mask(POSITIONS)))
    ]
    gradients = [torch.autograd.grad(mixed.square().sum(), qkv)[0] for mixed in results]
    for one, other in (results, gradients):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_attention_with_dropout_drops_and_keeps_the_mean() -> None:
    qkv = torch.randn(18, 3, 2, 6, dtype=torch.float64)
    cos, sin = angles(18, 2)
    plain = packed_attention(qkv, cos, sin, LAYOUT, scaling=0.4)
    torch.manual_seed(0)
    drawn = torch.stack([packed_attention(qkv, cos, sin, LAYOUT, scaling=0.4, dropout=0.2) for _ in range(3000)])
    assert not torch.equal(drawn[0], drawn[1])
    assert (drawn.mean(0) - plain).abs().max() < 5 * drawn.std(0).max() / 3000**0.5


def test_gradcheck_of_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "PIECE", 4)  # in three pieces, the last of them short
    x = torch.linspace(-4, 4, 10, dtype=torch.float64).view(2, 5).requires_grad_()
    assert torch.autograd.gradcheck(elementwise.gelu, (x,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gelu_equals_torchs_own(dtype: torch.dtype) -> None:
    """Reference: torch's GELU by tanh in float64, value and slope. The argument of the sigmoid is in the tens where its
    value still counts, and so is the rounding that it carries along: 64 last places of 1."""
    x = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([0.0, -0.0, 1e-8, 300.0, -300.0])]).to(dtype)
    expected_x = x.double().clone().requires_grad_()
    expected = F.gelu(expected_x, approximate="tanh")
    got_x = x.clone().requires_grad_()
    got = elementwise.gelu(got_x)
    assert got.dtype == dtype
    pairs = (
        (got, expected),
        (torch.autograd.grad(got.sum(), got_x)[0], torch.autograd.grad(expected.sum(), expected_x)[0]),
    )
    for one, other in pairs:
        torch.testing.assert_close(
            one.double(), other, rtol=4 * torch.finfo(dtype).eps, atol=64 * torch.finfo(dtype).eps
        )
    assert torch.equal(elementwise.gelu(x), F.gelu(x, approximate="tanh"))  # without gradients it is torch's


def test_gradcheck_of_the_residual_sum() -> None:
    hidden, attended, thought = (torch.randn(5, 6, dtype=torch.float64, requires_grad=True) for _ in range(3))
    keep = torch.rand(2, 5, 6) > 0.3
    assert torch.autograd.gradcheck(
        lambda *tensors: elementwise._DropoutAddResidual.apply(*tensors, keep[0], keep[1], 1.5),
        (hidden, attended, thought),
    )
    total = elementwise._DropoutAddResidual.apply(hidden, attended, thought, keep[0], keep[1], 1.5)
    torch.testing.assert_close(total, hidden + 1.5 * attended * keep[0] + 1.5 * thought * keep[1])


def test_residual_dropout_drops_its_share_everywhere_and_is_drawn_from_the_default_generator() -> None:
    """A tenth of 400,000: a share within five standard deviations, in each of the four places of a number of 64 bits,
    and no more alike from one place or draw to the next than chance has it."""
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = (elementwise._sample_dropout_mask(torch.empty(1000, 400), 6554).bool() for _ in range(2))
    p, spread = 6554 / 2**16, (0.1 * 0.9 / 100_000) ** 0.5
    for place in range(4):
        assert abs((~first).flatten()[place::4].float().mean() - p) < 5 * spread
        both = (~first).flatten()[place::4] & (~second).flatten()[place::4]
        neighbours = (~first).flatten()[place::4] & (~first).flatten().roll(-1)[place::4]
        for shared in (both, neighbours):
            assert abs(shared.float().mean() - p * p) < 5 * (p * p / 100_000) ** 0.5
    torch.set_rng_state(state)
    assert torch.equal(elementwise._sample_dropout_mask(torch.empty(1000, 400), 6554).bool(), first)
    assert elementwise._sample_dropout_mask(torch.empty(3, 3), 0).all()  # numbers of elements that four do not divide


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_of_the_head(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "LOGITS_BYTES", 3 * 7 * 16)  # of seven positions, three of the eleven tokens at a time
    head = nn.Linear(6, 11, bias=bias, dtype=torch.float64).requires_grad_(False)
    hidden = torch.randn(1, 9, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[IGNORE_INDEX, 3, 4, IGNORE_INDEX, 10, 0, 1, 2, 2]])
    assert torch.autograd.gradcheck(lambda hidden: causal_lm_loss(hidden, labels, head).nats * 0.7, (hidden,))


@pytest.mark.parametrize("tokens_at_a_time", [1, 4, 1000])
def test_a_frozen_head_in_slices_gives_what_a_trained_one_gives(
    tokens_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: torch's cross entropy, on the way that a head with gradients takes."""
    monkeypatch.setattr(loss, "LOGITS_BYTES", tokens_at_a_time * 16 * 16)  # 16 positions of 16 bytes
    head = nn.Linear(6, 11, dtype=torch.float64)
    hidden = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 11, (2, 9))
    expected = causal_lm_loss(hidden, labels, head)
    wanted = torch.autograd.grad(expected.nats, hidden)[0]
    got = causal_lm_loss(hidden, labels, copy.deepcopy(head).requires_grad_(False))
    torch.testing.assert_close(got.nats, expected.nats, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(got.nats, hidden)[0], wanted, rtol=1e-12, atol=1e-14)
    assert (got.num_tokens, got.num_correct) == (expected.num_tokens, expected.num_correct)


# As an ordinary function under what may be wrapped around it


def test_lora_under_activation_checkpointing_draws_the_same_dropout_again() -> None:
    layer = lora_layer(bias=True, dropout=0.4)
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    weights = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    gradients = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(2)
        gradients.append(torch.autograd.grad(run(x).square().sum(), weights))
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_lora_under_compile() -> None:
    """Traced whole, without a break; the eager backend, so that no compiler is needed to test it."""
    layer = lora_layer(bias=True, dropout=0.0, dtype=torch.float32)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 7, requires_grad=True)
    weights = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    gradients = [torch.autograd.grad(run(x).square().sum(), weights) for run in (layer, compiled)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_lora_under_ddp(tmp_path: Path) -> None:
    """A group of one: hooks, buckets and the reducer are those of many."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
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


def test_activation_checkpointing_changes_no_bit_of_loss_or_gradients(phi_dir: Path) -> None:
    """With all dropout on: it is drawn again as it was. Fewer tensors are kept in between."""
    results, kept = [], []
    for on in (False, True):
        module = new_module(phi_dir, dropout=True, lora_dropout=0.2, activation_checkpointing=on)
        torch.manual_seed(7)
        saved: list[int] = []
        ids = torch.arange(18).view(2, 9) * 5 % 400
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.numel()) or t, lambda t: t):
            hidden = packed_forward(
                module.fused_phi, ids, POSITIONS, activation_checkpointing=module.activation_checkpointing
            )
        nats = causal_lm_loss(hidden, ids, module.fused_phi.lm_head).nats
        nats.backward()
        gradients = [p.grad for p in trainable_parameters(module.phi).values()]
        results.append([nats.detach(), *gradients])
        kept.append(sum(saved))
    assert len(results[0]) == 13
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert kept[1] < kept[0] / 4


# All together


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_twenty_steps_equal_pefts_layers_and_transformers_attention(dtype: torch.dtype) -> None:
    """Reference: PEFT's LoRA Linear on the same fused base, transformers' own forward, a cross-entropy written here.

    In float64 loss and every LoRA tensor stay within 1e-9 in relative norm: it rounds at 1e-16, and Adam carries that
    along. In float32 the weights of both are made equal before each step, and its gradients are within 1e-5: it rounds
    at 6e-8, and a gradient sums some hundreds of products.
    """
    ours, theirs = two_ways(dtype)
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, foreach=False)
        for model in (ours, theirs)
    ]
    expected = dict(theirs.named_parameters())
    trained = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    for step in range(20):
        if dtype == torch.float32:
            ours.load_state_dict(theirs.state_dict())
        lengths = [7 + step % 3, 12, 5]
        ids = torch.randint(0, 97, (1, sum(lengths)))
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        labels = ids.clone()
        labels[:, positions[0] < 3] = IGNORE_INDEX
        hidden = packed_forward(ours.get_base_model(), ids, positions)
        got = causal_lm_loss(hidden, labels, ours.get_base_model().lm_head)
        nats, tokens, start = torch.zeros((), dtype=dtype), 0, 0
        for length in lengths:
            own = slice(start, start + length)
            logits = theirs(input_ids=ids[:, own]).logits[0, 2:-1]
            nats = nats + F.cross_entropy(logits, ids[0, own][3:], reduction="sum")
            tokens, start = tokens + length - 3, start + length
        means = (got.nats / got.num_tokens, nats / tokens)
        assert relative_difference(*(mean.detach() for mean in means)) < tolerance
        for mean, optimizer in zip(means, optimizers, strict=True):
            optimizer.zero_grad()
            mean.backward()
        if dtype == torch.float32:
            for name, parameter in trained.items():
                assert relative_difference(parameter.grad, expected[name].grad) < tolerance, name
        for optimizer in optimizers:
            optimizer.step()
    if dtype == torch.float64:
        for name, parameter in trained.items():
            assert relative_difference(parameter.detach(), expected[name].detach()) < 1e-9, name


def two_ways(dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A small fused Phi with LoRA on its way here, and the same with PEFT's own layers; B is not zero."""
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        resid_pdrop=0.0,
        initializer_range=0.3,
        attn_implementation="sdpa",
    )
    base = FusedPhiForCausalLM(config).to(dtype)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["Wqkv", "fc1", "fc2"], task_type="CAUSAL_LM")
    theirs = get_peft_model(base, lora, autocast_adapter_dtype=False)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    ours = copy.deepcopy(theirs)
    use_fused_lora(ours)
    assert sum(type(module) is FusedLoraLinear for module in ours.modules()) == 6
    return ours, theirs


@pytest.mark.slow
def test_in_bfloat16_two_hundred_steps_stay_in_the_band_of_plain_runs() -> None:
    """On the packaged base. The plain runs differ in nothing but the order in which they sum.

    They are PEFT's layers under transformers' own forward: the three examples of a step in one batch, one by one, and
    one by one backwards with attention written out. Rounding carries bfloat16 away from float32, and these from one
    another. Ours may be no further from float32, on average over the steps, than the furthest of them and half as much
    again, and at no step further out of their band than the band is wide at its widest. (On a CPU without bfloat16 the
    base's own products are those of products.py in the plain runs too: torch's would take most of an hour.)
    """
    lines = (TINY_PHI_DIR.parent / "claims" / "train.jsonl").read_text("utf-8").splitlines()[:600]
    tokenizer = load_tokenizer(resolve_base_model("tiny"))
    ids = torch.tensor([tokenizer(json.loads(line)["response"])["input_ids"][:64] for line in lines]).view(200, 3, 64)
    exact = torch.tensor(losses_of(ids, order=[[0, 1, 2]], dtype="float32"))
    ours = torch.tensor(losses_of(ids, order=[[0, 1, 2]], dtype="bfloat16", plain=False))
    plain = torch.tensor(
        [
            losses_of(ids, order=[[0, 1, 2]], dtype="bfloat16"),
            losses_of(ids, order=[[0], [1], [2]], dtype="bfloat16"),
            losses_of(ids, order=[[2], [1], [0]], dtype="bfloat16", attention="eager"),
        ]
    )
    away, plain_away = (ours - exact).abs().mean(), (plain - exact).abs().mean(1)
    low, high = plain.min(0).values, plain.max(0).values
    width = (high - low).max()
    print(f"\nfrom float32, on average: ours {away:.2e}, plain {', '.join(f'{one:.2e}' for one in plain_away)}")
    print(f"band of the plain runs: {(high - low).mean():.2e} wide, {width:.2e} at most; loss {exact[-20:].mean():.3f}")
    assert away < 1.5 * plain_away.max()
    assert (ours < high + width).all()
    assert (ours > low - width).all()


def losses_of(
    ids: Tensor, *, order: list[list[int]], dtype: str, plain: bool = True, attention: str = "sdpa"
) -> list[float]:
    """Losses of the steps over (steps, examples, T) ids, all tokens but the first of each learned.

    Args:
        ids: of all steps.
        order: the examples that go through the model together, group after group.
        dtype: of the base and its products.
        plain: PEFT's layers and transformers' forward; otherwise ours.
        attention: transformers' implementation.
    """
    module = LitPhi2(base="tiny", lora_r=8, lora_alpha=16, dtype=dtype)
    module.configure_model()
    phi = module.phi.eval()  # without dropout
    module.fused_phi.set_attn_implementation(attention)
    for layer in phi.modules():
        if plain and type(layer) is FusedLoraLinear:
            layer.__class__ = PeftLinear
    optimizer = torch.optim.AdamW(trainable_parameters(phi).values(), lr=3e-3)
    losses = []
    for rows in ids:
        total, count = 0.0, rows[:, 1:].numel()
        for chosen in order:
            group = rows[chosen]
            if plain:
                logits = phi(input_ids=group, use_cache=False).logits[:, :-1].float()
                nats = F.cross_entropy(logits.flatten(0, 1), group[:, 1:].flatten(), reduction="sum")
            else:
                labels = group.clone()
                labels[:, 0] = IGNORE_INDEX
                hidden = packed_forward(module.fused_phi, group, torch.arange(group.shape[1]).expand_as(group))
                nats = causal_lm_loss(hidden, labels, module.fused_phi.lm_head).nats
            (nats / count).backward()
            total += nats.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / count)
    return losses


# On other devices: reported as not run where there is none


DEVICES = [pytest.param("cuda", marks=pytest.mark.cuda), pytest.param("mps", marks=pytest.mark.mps)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_on_a_device_equals_that_on_the_cpu(device: str, dtype: torch.dtype) -> None:
    """Values and gradients, against float64 on the CPU; bfloat16 keeps 8 bits, and a sum of 16 products loses two."""
    torch.manual_seed(0)
    qkv = torch.randn(18, 3, 2, 16, dtype=torch.float64).to(dtype)
    cos, sin = angles(18, 4)
    exact = qkv.double().requires_grad_()
    expected = packed_attention(exact, cos, sin, LAYOUT, scaling=0.25)
    wanted = torch.autograd.grad(expected.sum(), exact)[0]
    there = qkv.to(device).requires_grad_()
    layout = packed_layout(POSITIONS.to(device))
    got = packed_attention(there, cos.to(device, dtype), sin.to(device, dtype), layout, scaling=0.25)
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.cpu().double(), expected, rtol=tolerance, atol=tolerance)
    gradient = torch.autograd.grad(got.sum(), there)[0]
    torch.testing.assert_close(gradient.cpu().double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_loss_and_gradients_on_a_device_equal_those_on_the_cpu(device: str, phi_dir: Path) -> None:
    """Float32; devices sum in other orders, hence 1e-4 in relative norm."""
    results = []
    examples = [Example(str(n), list(range(5 + n, 40 + 7 * n)), 4) for n in range(3)]
    for place in ("cpu", device):
        module = new_module(phi_dir)
        module.to(place)
        batch = collate(examples, [(0, 1), (2,)]).to(place)
        nats = module.loss(batch).nats
        nats.backward()
        gradients = {name: p.grad.cpu() for name, p in trainable_parameters(module.phi).items()}
        results.append({"nats": nats.detach().cpu(), **gradients})
    for name, expected in results[0].items():
        if expected.any():
            assert relative_difference(results[1][name], expected) < 1e-4, name


def test_rows_padded_to_a_multiple_have_the_same_loss(phi_dir: Path) -> None:
    """As a batch is on its way to MPS; here on the CPU. Padding is an example of its own, so nothing else changes."""
    examples = [Example(str(n), list(range(5 + n, 40 + 7 * n)), 4) for n in range(3)]
    module = new_module(phi_dir)
    batch = collate(examples, [(0, 1), (2,)])
    padded = pad_to_multiple(batch, 128)
    assert padded.input_ids.shape == padded.position_ids.shape == padded.labels.shape == (2, 128)
    with torch.no_grad():
        one, other = module.loss(batch), module.loss(padded)
    torch.testing.assert_close(one.nats, other.nats, rtol=1e-6, atol=0)
    assert one.num_tokens == other.num_tokens
