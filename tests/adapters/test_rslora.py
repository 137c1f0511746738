"""model.use_rslora: the scale is alpha / sqrt(rank), in the model and wherever an adapter is kept."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PhiForCausalLM

from helpers import new_data, new_module, new_trainer
from lit_phi2.adapters.adapter import check_adapter
from lit_phi2.adapters.checkpoint import read_adapter
from lit_phi2.adapters.peft_format import save_adapter
from lit_phi2.errors import InputError
from lit_phi2.model.lora import LoraSettings
from lit_phi2.model.phi2 import packed_forward
from lit_phi2.training.module import LitPhi2
from lit_phi2.utils.files import tree_digest

IDS, POSITIONS = torch.arange(3, 43)[None], torch.arange(40)[None]


def logits_of(module: LitPhi2) -> Tensor:
    module.eval()
    with torch.no_grad():
        return module.fused_phi.lm_head(packed_forward(module.fused_phi, IDS, POSITIONS))


@pytest.mark.parametrize(("rank", "alpha"), [(16, 4), (9, 5), (3, 5)])
def test_the_scale_has_a_closed_form(rank: int, alpha: int) -> None:
    """Kalajdzievski 2023, arXiv:2312.03732: alpha / sqrt(r); plain LoRA's is alpha / r."""
    assert LoraSettings(rank, alpha, ("fc1",)).scale == alpha / rank
    assert LoraSettings(rank, alpha, ("fc1",), use_rslora=True).scale == alpha / math.sqrt(rank)


def test_the_model_multiplies_by_it(phi_dir: Path) -> None:
    """Reference: plain LoRA of the same scale, 4 / sqrt(16) = 16 / 16, bit for bit."""
    stabilised = logits_of(new_module(phi_dir, lora_r=16, lora_alpha=4, use_rslora=True))
    assert torch.equal(stabilised, logits_of(new_module(phi_dir, lora_r=16, lora_alpha=16)))
    assert not torch.equal(stabilised, logits_of(new_module(phi_dir, lora_r=16, lora_alpha=4)))


@pytest.mark.parametrize("rank", [4, 3])
def test_an_exported_adapter_has_peft_s_logits(rank: int, phi_dir: Path, tmp_path: Path) -> None:
    """Reference: PEFT, which reads use_rslora in its own key, on transformers' Phi."""
    module = new_module(phi_dir, lora_r=rank, lora_alpha=40, use_rslora=True)
    adapter = module.trained_adapter()
    save_adapter(adapter, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_rslora"] is True
    peft = PeftModel.from_pretrained(PhiForCausalLM.from_pretrained(phi_dir), str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits_of(module), peft(input_ids=IDS).logits, rtol=0, atol=1e-5)
    imported = read_adapter(tmp_path)
    assert imported.settings == adapter.settings
    assert all(torch.equal(imported.weights[name], weight) for name, weight in adapter.weights.items())


@pytest.fixture
def run(phi_dir: Path, write_jsonl: Callable[..., Path], record_rows: list[dict[str, str]], tmp_path: Path) -> Path:
    """The folder of a run with use_rslora."""
    module = new_module(phi_dir, use_rslora=True)
    new_trainer(tmp_path, keep=True, max_steps=1).fit(module, new_data(phi_dir, write_jsonl(record_rows)))
    return tmp_path / "run" / "version_0"


def test_a_checkpoint_keeps_it(run: Path) -> None:
    for path in (run / "checkpoints" / "last.ckpt", run / "adapter"):
        assert read_adapter(path).settings == LoraSettings(4, 8, ("Wqkv", "fc1", "fc2"), use_rslora=True)


def test_former_code_does_not_take_it_for_plain_lora(run: Path) -> None:
    """Code without this setting reads format 3 alone, and would not miss the key; of a folder it refuses the key."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["lit_phi2"]["format_version"] != 3


@pytest.mark.parametrize(("format_version", "is_read"), [(3, True), (4, False), (5, False), (2, False)])
def test_a_checkpoint_without_it_is_of_the_former_format(format_version: int, is_read: bool, run: Path) -> None:
    """As those before this setting are; they are plain LoRA."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    del checkpoint["digest"], checkpoint["lit_phi2"]["use_rslora"]
    checkpoint["lit_phi2"]["format_version"] = format_version
    torch.save({**checkpoint, "digest": tree_digest(checkpoint)}, run / "former.ckpt")
    if is_read:
        assert read_adapter(run / "former.ckpt").settings == LoraSettings(4, 8, ("Wqkv", "fc1", "fc2"))
        return
    with pytest.raises(InputError, match=r"has no use_rslora|its format is \d, this one reads 3 and 4"):
        read_adapter(run / "former.ckpt")


def test_another_kind_of_scale_is_refused(phi_dir: Path) -> None:
    module = new_module(phi_dir, use_rslora=True)
    plain = replace(module.lora_settings, use_rslora=False)
    with pytest.raises(InputError, match=r"has use_rslora True, but model\.use_rslora is False; make them equal"):
        check_adapter(module.trained_adapter(), plain, module.checked.model, source="adapter")
