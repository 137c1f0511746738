"""The adapter: what it trains, how it travels, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import new_module, weights_of
from lit_phi2.adapters.checkpoint import read_adapter
from lit_phi2.adapters.peft_format import save_adapter
from lit_phi2.errors import InputError
from lit_phi2.model.loading import load_phi2
from lit_phi2.model.lora import check_targets, load_adapter_state_dict
from lit_phi2.model.phi2 import packed_forward
from lit_phi2.pretrained import BaseModel
from lit_phi2.training.module import LitPhi2

LAYERS, WIDTH, INNER = 2, 64, 256


@pytest.mark.parametrize("rank", [1, 2, 8])
def test_the_number_of_trained_parameters_is_that_of_the_closed_form(rank: int, phi_dir: Path) -> None:
    """A (r, in) and B (out, r) on each of Wqkv, fc1 and fc2; Phi-2 at r=2 has 2,293,760 by the same formula."""
    module = new_module(phi_dir, lora_r=rank)
    per_rank = (WIDTH + 3 * WIDTH) + (WIDTH + INNER) + (INNER + WIDTH)
    assert sum(weight.numel() for weight in weights_of(module).values()) == LAYERS * rank * per_rank
    assert 32 * 2 * ((2560 + 7680) + 2 * (2560 + 10240)) == 2_293_760


def test_a_fresh_adapter_leaves_the_logits_unchanged(phi_dir: Path, base: BaseModel) -> None:
    """Reference: the base alone; exactly, since B is zero."""
    module = LitPhi2(base=str(phi_dir), dtype="float32")
    module.configure_model()
    module.eval()
    ids, positions = torch.arange(20)[None], torch.arange(20)[None]
    with torch.no_grad():
        got = packed_forward(module.fused_phi, ids, positions)
        assert torch.equal(got, packed_forward(load_phi2(base, torch.float32), ids, positions))


def test_an_adapter_starts_the_same_whatever_drew_random_numbers_before(phi_dir: Path) -> None:
    starts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        module = LitPhi2(base=str(phi_dir), dtype="float32")
        module.configure_model()
        starts.append(weights_of(module))
    assert all(torch.equal(weight, starts[1][name]) for name, weight in starts[0].items())


@pytest.mark.parametrize(
    ("targets", "available", "told"),
    [
        (
            ["Wqkv", "o_proj"],
            {"Wqkv": 2, "fc1": 2},
            r"'o_proj' names no linear layer of this base; a block has Wqkv, fc1",
        ),
        (["q_proj"], {"Wqkv": 2, "fc1": 2}, "name Wqkv"),
        (["fc1"], {"Wqkv": 2, "fc1": 1}, "'fc1' names no linear layer"),
        ([], {"Wqkv": 2}, "is empty"),
        (["fc1", "fc1"], {"fc1": 2}, "twice"),
    ],
)
def test_a_target_that_would_be_ignored_is_refused(targets: list[str], available: dict[str, int], told: str) -> None:
    with pytest.raises(InputError, match=told):
        check_targets(targets, available, 2)


def test_an_adapter_survives_the_way_to_disk_and_back(phi_dir: Path, tmp_path: Path) -> None:
    """Exactly, by way of q_proj, k_proj and v_proj."""
    module = new_module(phi_dir)
    adapter = module.trained_adapter()
    save_adapter(adapter, tmp_path)
    back = read_adapter(tmp_path)
    assert all(torch.equal(weight, back.weights[name]) for name, weight in adapter.weights.items())
    assert (back.settings, back.base, back.template_version) == (
        adapter.settings,
        adapter.base,
        adapter.template_version,
    )
    (tmp_path / "lit_phi2.json").unlink()  # as any other tool writes it
    plain = read_adapter(tmp_path)
    assert set(plain.weights) == set(adapter.weights)
    assert (plain.settings.lora_r, set(plain.settings.target_modules)) == (4, {"Wqkv", "fc1", "fc2"})


def test_projections_that_do_not_share_their_a_are_refused(phi_dir: Path, tmp_path: Path) -> None:
    save_adapter(new_module(phi_dir).trained_adapter(), tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"
    weights[name] = weights[name] + 1
    save_file(weights, tmp_path / "adapter_model.safetensors")
    (tmp_path / "lit_phi2.json").unlink()  # as from elsewhere, where nothing tells a digest
    with pytest.raises(InputError, match="different A"):
        read_adapter(tmp_path)


def test_a_variant_that_would_be_misread_is_refused(phi_dir: Path, tmp_path: Path) -> None:
    save_adapter(new_module(phi_dir).trained_adapter(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(InputError, match="use_dora is True; only False is supported"):
        read_adapter(tmp_path)


def test_weights_that_do_not_fit_are_refused_naming_the_first(phi_dir: Path) -> None:
    module = new_module(phi_dir)
    weights = weights_of(module)
    first = next(iter(weights))
    missing = {name: weight for name, weight in weights.items() if name != first}
    for wrong, told in (
        (missing, "has no weight"),
        (weights | {"stranger": torch.zeros(1)}, "holds a weight 'stranger'"),
        (weights | {first: weights[first][:, :-1]}, r"has shape \(4, 63\); expected \(4, 64\)"),
    ):
        with pytest.raises(InputError, match=told):
            load_adapter_state_dict(module.phi, wrong, source="x.ckpt")


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match=r"x\.ckpt: is not a whole checkpoint"):
        read_adapter(tmp_path / "x.ckpt")
    with pytest.raises(InputError, match="is not a folder with a whole adapter"):
        read_adapter(tmp_path)
