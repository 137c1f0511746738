"""Bases and adapters with the names of Phi-2's original code, against that architecture written out here.

The layout is that of the first modeling_phi.py of microsoft/phi-2: Wqkv's output is (3, heads, head_dim), the first
rotary_dim elements of a head are rotated in two halves, attention and MLP read one norm.
"""

import json
import logging
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from transformers import PhiForCausalLM

from export.support import random_adapter, reference_of
from lit_phi2.adapters.adapter import Adapter, check_adapter
from lit_phi2.adapters.checkpoint import read_adapter
from lit_phi2.base_config import read_base_config
from lit_phi2.cli.main import main
from lit_phi2.errors import InputError
from lit_phi2.export.card import CardFacts
from lit_phi2.export.exporter import export, plan_export
from lit_phi2.export.weights import ModelWeights
from lit_phi2.model.loading import load_phi2
from lit_phi2.model.lora import LoraSettings, add_lora, load_adapter_state_dict
from lit_phi2.model.phi2 import packed_forward
from lit_phi2.model.streaming import load_streamed_phi2
from lit_phi2.pretrained import TINY_PHI_DIR, load_tokenizer, resolve_base_model

WIDTH, HEADS, HEAD_DIM, ROTARY_DIM, LAYERS = 64, 4, 16, 6, 2
IDS, POSITIONS = torch.arange(3, 43)[None], torch.arange(40)[None]


def rotate(x: Tensor) -> Tensor:
    """(B, T, H, d) -> (B, T, H, d)."""
    angles = torch.outer(
        torch.arange(x.shape[1]).float(), 10000.0 ** (-torch.arange(0, ROTARY_DIM, 2).float() / ROTARY_DIM)
    )
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x[..., :ROTARY_DIM].chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos, x[..., ROTARY_DIM:]], dim=-1)


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.Wqkv, self.out_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.Wqkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
        heads = (part.transpose(1, 2) for part in (rotate(query), rotate(key), value))
        return self.out_proj(scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln, self.mixer, self.mlp = nn.LayerNorm(WIDTH), Mixer(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln(x)
        return x + self.mixer(normed) + self.mlp(normed)


class OriginalPhi(nn.Module):
    def __init__(self, num_rows: int) -> None:
        super().__init__()
        embd = nn.ModuleDict({"wte": nn.Embedding(num_rows, WIDTH)})
        self.transformer = nn.ModuleDict({"embd": embd, "h": nn.ModuleList(Block() for _ in range(LAYERS))})
        self.lm_head = nn.ModuleDict({"ln": nn.LayerNorm(WIDTH), "linear": nn.Linear(WIDTH, num_rows)})

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.transformer["embd"]["wte"](ids)
        for block in self.transformer["h"]:
            hidden = block(hidden)
        return self.lm_head["linear"](self.lm_head["ln"](hidden))


@pytest.fixture(scope="module")
def original() -> OriginalPhi:
    num_rows = json.loads((TINY_PHI_DIR / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    model = OriginalPhi(-(-num_rows // 64) * 64).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.1 + (parameter.data.ndim == 1)
    return model


@pytest.fixture(scope="module")
def original_dir(original: OriginalPhi, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the original code saves it: its own keys in config.json, its own names of weights."""
    folder = tmp_path_factory.mktemp("original")
    config = {
        "architectures": ["PhiForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_phi.PhiConfig",
            "AutoModelForCausalLM": "modeling_phi.PhiForCausalLM",
        },
        "activation_function": "gelu_new",
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "flash_attn": False,
        "flash_rotary": False,
        "fused_dense": False,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "phi-msft",
        "n_embd": WIDTH,
        "n_head": HEADS,
        "n_head_kv": None,
        "n_inner": None,
        "n_layer": LAYERS,
        "n_positions": 512,
        "resid_pdrop": 0.1,
        "rotary_dim": ROTARY_DIM,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": original.lm_head["linear"].out_features,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(original.state_dict(), folder / "model.safetensors", {"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_PHI_DIR / name, folder)
    return folder


def logits_of(folder: Path, adapter: Adapter | None = None) -> Tensor:
    base = resolve_base_model(str(folder))
    model: Any = load_phi2(base, torch.float32)
    if adapter is not None:
        adapter = check_adapter(adapter, adapter.settings, base, source="adapter")
        phi = add_lora(model, adapter.settings, dropout=0.0)
        load_adapter_state_dict(phi, adapter.weights, source="adapter")
        model = phi.eval().get_base_model()
    with torch.no_grad():
        return model.lm_head(packed_forward(model, IDS, POSITIONS))


def test_a_base_of_the_original_code_has_its_logits(
    original: OriginalPhi, original_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Logits of magnitude 6; 1e-5 is some roundings of float32."""
    caplog.set_level(logging.INFO, "lit_phi2")
    with torch.no_grad():
        expected = original(IDS)
    difference = (logits_of(original_dir) - expected).abs().max().item()
    assert difference < 1e-5
    assert "has the names of Phi-2's original code; it is converted while it is read" in caplog.text
    assert load_tokenizer(resolve_base_model(str(original_dir))).eos_token_id is not None


@pytest.mark.parametrize("selection", [{}, {"layers_to_transform": [1], "layers_pattern": "h"}], ids=["all", "one"])
def test_an_adapter_of_the_original_code_has_its_logits(
    selection: dict[str, Any], original: OriginalPhi, original_dir: Path, tmp_path: Path
) -> None:
    """Reference: PEFT on the original architecture; patterns there name layers and blocks as that code does."""
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["Wqkv", "out_proj", "fc1", "fc2"],
        rank_pattern={"transformer.h.1.mixer.Wqkv": 6},
        **selection,
    )
    model = OriginalPhi(original.lm_head["linear"].out_features).eval()
    model.load_state_dict(original.state_dict())
    peft = get_peft_model(model, config)  # type: ignore[arg-type]  # any module will do
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
        expected, without = peft(IDS), original(IDS)
    peft.save_pretrained(tmp_path, save_embedding_layers=False)
    adapter = read_adapter(tmp_path)
    assert set(adapter.settings.target_modules) == {"Wqkv", "dense", "fc1", "fc2"}
    difference = (logits_of(original_dir, adapter) - expected).abs().max().item()
    assert difference < 1e-5
    assert (expected - without).abs().max() > 0.1


def test_a_streamed_original_base_gives_the_same_numbers(original_dir: Path) -> None:
    """Reference: load_phi2, whose logits are the original code's."""
    base = resolve_base_model(str(original_dir))
    models = load_phi2(base, torch.float32), load_streamed_phi2(base, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(*(packed_forward(model, IDS, POSITIONS) for model in models))


def test_an_export_of_the_original_base_has_transformers_names(original: OriginalPhi, original_dir: Path) -> None:
    """By hand: rows of Wqkv, q first."""
    exported = dict(ModelWeights(resolve_base_model(str(original_dir)), None))
    qkv = original.transformer["h"][1].mixer.Wqkv
    for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
        rows = slice(index * WIDTH, (index + 1) * WIDTH)
        assert torch.equal(exported[f"model.layers.1.self_attn.{name}.weight"], qkv.weight[rows])
        assert torch.equal(exported[f"model.layers.1.self_attn.{name}.bias"], qkv.bias[rows])
    assert torch.equal(exported["model.final_layernorm.weight"], original.lm_head["ln"].weight)
    assert len(exported) == 33


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_an_export_on_the_original_base_is_run(
    format: str, original_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In transformers, which knows the base by converted names only; the log gives the command that converts it."""
    caplog.set_level(logging.INFO, "lit_phi2")
    base = resolve_base_model(str(original_dir))
    adapter = random_adapter(base, LoraSettings(2, 4, ("Wqkv", "fc2")))
    plan = plan_export(adapter, base, tmp_path / "out", format=format, dtype="float32", source="adapter")
    check = export(plan, reference_of(base, adapter, 2, max_tokens=8), CardFacts())
    assert check.method == "runtime"
    assert ("names of Phi-2's original code, which this runtime does not read" in caplog.text) == (format == "peft")


def test_the_printed_command_converts_the_original_base(
    original_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As it stands in the log, from a folder with a space; PEFT on its result has the running model's logits."""
    caplog.set_level(logging.INFO, "lit_phi2")
    shutil.copytree(original_dir, tmp_path / "my base")
    base = resolve_base_model(str(tmp_path / "my base"))
    adapter = random_adapter(base, LoraSettings(2, 4, ("Wqkv", "fc2")))
    monkeypatch.chdir(tmp_path)
    export(plan_export(adapter, base, Path("out"), format="peft", dtype=None, source="adapter"), None, CardFacts())
    command = next(line for text in caplog.messages for line in text.splitlines() if "python -m lit_phi2" in line)
    assert main([*shlex.split(command)[3:], "--check", "0"]) == 0
    assert "'phi-2-converted'" in caplog.text.replace('"', "'")  # where the last line loads it from
    peft = PeftModel.from_pretrained(PhiForCausalLM.from_pretrained("phi-2-converted"), "out").eval()
    with torch.no_grad():
        difference = (peft(input_ids=IDS).logits - logits_of(base.folder, adapter)).abs().max()
    assert difference < 1e-5


@pytest.mark.parametrize("key", ["n_embd", "n_layer", "n_head", "n_positions", "rotary_dim", "activation_function"])
@pytest.mark.parametrize("value", ["two", -1, 2**40])
def test_a_wrong_value_in_an_original_config_is_named(key: str, value: Any, original_dir: Path, tmp_path: Path) -> None:
    config = json.loads((original_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(InputError, match=rf"config\.json: ({key}|hidden_act) is "):
        read_base_config(tmp_path)


@pytest.mark.parametrize("rotary_dim", range(2, 129, 2))
def test_every_rotary_dim_survives_as_a_fraction(rotary_dim: int, original_dir: Path, tmp_path: Path) -> None:
    """transformers computes int(head_dim * partial_rotary_factor)."""
    config = json.loads((original_dir / "config.json").read_text())
    for head_dim in (rotary_dim, 80, 96, 128, 130, 194):
        changes = {"n_embd": 4 * head_dim, "rotary_dim": rotary_dim}
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        factor = read_base_config(tmp_path)["rope_parameters"]["partial_rotary_factor"]
        assert int(head_dim * factor) == min(rotary_dim, head_dim)
