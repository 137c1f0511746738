"""Our whole training step: against PEFT's layers and transformers' blocks, on other devices, and in bfloat16."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name that torch's own documentation uses
from transformers import PhiConfig
from transformers.models.phi.modeling_phi import PhiDecoderLayer, apply_rotary_pos_emb

from helpers import DEVICES, new_module, relative_difference
from lit_phi2.data.collate import collate
from lit_phi2.model.lora import FusedLoraLinear, trainable_parameters, use_fused_lora
from lit_phi2.model.loss import causal_lm_loss
from lit_phi2.model.phi2 import FusedPhiForCausalLM, Phi2Block, packed_forward
from lit_phi2.pretrained import TINY_PHI_DIR, load_tokenizer, resolve_base_model
from lit_phi2.training.module import LitPhi2
from lit_phi2.types import IGNORE_INDEX, Example, pad_to_multiple

POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0], [0, 1, 2, 3, 0, 0, 0, 1, 2]])


class ReferenceBlock(PhiDecoderLayer):
    """transformers' own block forward over a fused Wqkv: its attention written out, its residual sum as it is there."""

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: object) -> Tensor:
        attn, normed = self.self_attn, self.input_layernorm(hidden_states)
        qkv = attn.Wqkv(normed).unflatten(-1, (3, -1, attn.head_dim))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, d) each
        rotary, cos, sin = attn.rotary_ndims, *position_embeddings
        query_rot, key_rot = apply_rotary_pos_emb(query[..., :rotary], key[..., :rotary], cos, sin)
        query = torch.cat([query_rot, query[..., rotary:]], -1)
        key = torch.cat([key_rot, key[..., rotary:]], -1)
        scores = query @ key.transpose(2, 3) * attn.head_dim**-0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        probs = scores.masked_fill(future, float("-inf")).softmax(-1)
        attn_output = attn.dense((probs @ value).transpose(1, 2).flatten(2))
        return self.resid_dropout(attn_output) + self.resid_dropout(self.mlp(normed)) + hidden_states


def use_reference_blocks(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is Phi2Block:
            module.__class__ = ReferenceBlock
            module.mlp.activation_fn = nn.GELU(approximate="tanh")


def our_model_and_reference(dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A small fused Phi with LoRA as we run it, and the same with PEFT's layers and transformers' block."""
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
    reference = get_peft_model(base, lora, autocast_adapter_dtype=False)
    for name, parameter in reference.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    ours = copy.deepcopy(reference)
    use_fused_lora(ours)
    use_reference_blocks(reference)
    assert sum(type(module) is FusedLoraLinear for module in ours.modules()) == 6
    assert sum(type(module) is ReferenceBlock for module in reference.modules()) == 2
    return ours, reference


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_twenty_steps_equal_peft_and_transformers(dtype: torch.dtype) -> None:
    """Reference: PEFT's LoRA Linear and transformers' block on the same weights, a cross-entropy written here.

    In float64 loss and every LoRA tensor stay within 1e-9 in relative norm: it rounds at 1e-16, and Adam carries that
    along. In float32 the weights of both are made equal before each step, and the gradients are within 1e-5: it rounds
    at 6e-8, and a gradient sums some hundreds of products.
    """
    ours, reference = our_model_and_reference(dtype)
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, foreach=False)
        for model in (ours, reference)
    ]
    expected = dict(reference.named_parameters())
    trained = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    for step in range(20):
        if dtype == torch.float32:
            ours.load_state_dict(reference.state_dict())
        lengths = [7 + step % 3, 12, 5]
        ids = torch.randint(0, 97, (1, sum(lengths)))
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        labels = ids.clone()
        labels[:, positions[0] < 3] = IGNORE_INDEX
        hidden = packed_forward(ours.get_base_model(), ids, positions)
        loss = causal_lm_loss(hidden, labels, ours.get_base_model().lm_head)
        means = (loss.nats / loss.num_tokens, reference_mean(reference, ids, lengths))
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


def reference_mean(reference: nn.Module, ids: Tensor, lengths: list[int]) -> Tensor:
    """Mean cross-entropy of all tokens but the first three of each example, every example run alone."""
    nats, start = torch.zeros((), dtype=next(reference.parameters()).dtype), 0
    for length in lengths:
        example = ids[:, start : start + length]
        logits = reference(input_ids=example, use_cache=False).logits[0, 2:-1]
        nats = nats + F.cross_entropy(logits, example[0, 3:], reduction="sum")
        start += length
    return nats / (sum(lengths) - 3 * len(lengths))


def test_our_cached_forward_equals_transformers_block() -> None:
    """Logits of whole prompts and token by token through the cache; reference: transformers' block, float64."""
    ours, reference = our_model_and_reference(torch.float64)
    ours.eval()
    ids = torch.randint(0, 97, (2, 12))
    with torch.no_grad():
        expected = reference(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(ours(input_ids=ids, use_cache=False).logits, expected, rtol=1e-9, atol=1e-12)
        output = ours(input_ids=ids[:, :5], use_cache=True)
        logits = [output.logits]
        for position in range(5, 12):
            cache, token = output.past_key_values, ids[:, position : position + 1]
            output = ours(input_ids=token, past_key_values=cache, use_cache=True)
            logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-9, atol=1e-12)


def test_activation_checkpointing_changes_no_bit(phi_dir: Path) -> None:
    """Of loss and gradients, with all dropout on: it is drawn again as it was. Fewer tensors are saved in between."""
    results, saved_numel = [], []
    for enabled in (False, True):
        module = new_module(phi_dir, dropout=True, lora_dropout=0.2, activation_checkpointing=enabled)
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
        saved_numel.append(sum(saved))
    assert len(results[0]) == 13
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)
    assert saved_numel[1] < saved_numel[0] / 4


def test_rows_padded_to_a_multiple_have_the_same_loss(phi_dir: Path) -> None:
    """As a batch is moved to MPS, here on the CPU. Padding is an example of its own, so nothing else changes."""
    examples = [Example(str(n), list(range(5 + n, 40 + 7 * n)), 4) for n in range(3)]
    module = new_module(phi_dir)
    batch = collate(examples, [(0, 1), (2,)])
    padded = pad_to_multiple(batch, 128)
    assert padded.input_ids.shape == padded.position_ids.shape == padded.labels.shape == (2, 128)
    with torch.no_grad():
        loss, padded_loss = module.loss(batch), module.loss(padded)
    torch.testing.assert_close(loss.nats, padded_loss.nats, rtol=1e-6, atol=0)
    assert loss.num_tokens == padded_loss.num_tokens


@pytest.mark.parametrize("device", DEVICES)
def test_a_devices_loss_and_gradients_equal_the_cpus(device: str, phi_dir: Path) -> None:
    """Float32; devices sum in other orders, hence 1e-4 in relative norm."""
    results = []
    examples = [Example(str(n), list(range(5 + n, 40 + 7 * n)), 4) for n in range(3)]
    for target in ("cpu", device):
        module = new_module(phi_dir)
        module.to(target)
        batch = collate(examples, [(0, 1), (2,)]).to(target)
        nats = module.loss(batch).nats
        nats.backward()
        gradients = {name: p.grad.cpu() for name, p in trainable_parameters(module.phi).items()}
        results.append({"nats": nats.detach().cpu(), **gradients})
    for name, expected in results[0].items():
        if expected.any():
            assert relative_difference(results[1][name], expected) < 1e-4, name


@pytest.mark.slow
def test_bfloat16_stays_in_the_band_of_plain_runs() -> None:
    """Thirty steps on the packaged base. The plain runs differ only in the order in which they sum.

    They use PEFT's layers under transformers' own forward: the three examples of a step in one batch, one by one, and
    one by one in reverse order with eager attention. Rounding moves bfloat16 away from float32, and these runs from one
    another. Ours may be, on average over the steps, at most 1.5 times as far from float32 as the furthest of them, and
    at no step further outside their band than the band's largest width. (On a CPU without bfloat16 the base's matmuls
    are those of linear.py in the plain runs too: torch's own would take most of an hour.)
    """
    lines = (TINY_PHI_DIR.parent / "claims" / "train.jsonl").read_text("utf-8").splitlines()[:90]
    tokenizer = load_tokenizer(resolve_base_model("tiny"))
    ids = torch.tensor([tokenizer(json.loads(line)["response"])["input_ids"][:64] for line in lines]).view(30, 3, 64)
    float32 = torch.tensor(step_losses(ids, groups=[[0, 1, 2]], dtype="float32"))
    ours = torch.tensor(step_losses(ids, groups=[[0, 1, 2]], dtype="bfloat16", plain=False))
    plain = torch.tensor(
        [
            step_losses(ids, groups=[[0, 1, 2]], dtype="bfloat16"),
            step_losses(ids, groups=[[0], [1], [2]], dtype="bfloat16"),
            step_losses(ids, groups=[[2], [1], [0]], dtype="bfloat16", attention="eager"),
        ]
    )
    distance, plain_distance = (ours - float32).abs().mean(), (plain - float32).abs().mean(1)
    low, high = plain.min(0).values, plain.max(0).values
    width = (high - low).max()
    print(f"\nmean distance from float32: ours {distance:.2e}, plain {', '.join(f'{d:.2e}' for d in plain_distance)}")
    print(
        f"band of the plain runs: {(high - low).mean():.2e} wide, at most {width:.2e}; loss {float32[-20:].mean():.3f}"
    )
    assert distance < 1.5 * plain_distance.max()
    assert (ours < high + width).all()
    assert (ours > low - width).all()


def step_losses(
    ids: Tensor, *, groups: list[list[int]], dtype: str, plain: bool = True, attention: str = "sdpa"
) -> list[float]:
    """The loss of each step over (steps, examples, T) ids; all tokens but the first of each example are supervised.

    Args:
        ids: of all steps.
        groups: the examples that go through the model together, group after group.
        dtype: of the base and its matmuls.
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
        for members in groups:
            group = rows[members]
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
