"""The adapter: what it trains, that it survives being written and read, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import new_data, new_module, new_trainer, weights_of
from lit_phi2.adapters.checkpoint import read_adapter, read_checkpoint
from lit_phi2.adapters.peft_format import save_adapter
from lit_phi2.errors import InputError
from lit_phi2.model.loading import load_phi2
from lit_phi2.model.lora import check_targets, load_adapter_state_dict
from lit_phi2.model.phi2 import packed_forward
from lit_phi2.pretrained import BaseModel
from lit_phi2.training.module import LitPhi2
from lit_phi2.utils.files import tree_digest

LAYERS, WIDTH, INNER = 2, 64, 256


@pytest.mark.parametrize("rank", [1, 2, 8])
def test_the_number_of_trained_parameters_has_a_closed_form(rank: int, phi_dir: Path) -> None:
    """A (r, in) and B (out, r) on each of Wqkv, fc1 and fc2; Phi-2 at r=2 has 2,293,760 by the same formula."""
    module = new_module(phi_dir, lora_r=rank)
    per_rank = (WIDTH + 3 * WIDTH) + (WIDTH + INNER) + (INNER + WIDTH)
    assert sum(weight.numel() for weight in weights_of(module).values()) == LAYERS * rank * per_rank
    assert 32 * 2 * ((2560 + 7680) + 2 * (2560 + 10240)) == 2_293_760


def test_a_new_adapter_leaves_the_logits_unchanged(phi_dir: Path, base: BaseModel) -> None:
    """Reference: the base alone; exactly, since B is zero."""
    module = LitPhi2(base=str(phi_dir), dtype="float32")
    module.configure_model()
    module.eval()
    ids, positions = torch.arange(20)[None], torch.arange(20)[None]
    with torch.no_grad():
        hidden = packed_forward(module.fused_phi, ids, positions)
        assert torch.equal(hidden, packed_forward(load_phi2(base, torch.float32), ids, positions))


def test_a_new_adapter_depends_on_the_seed_alone(phi_dir: Path) -> None:
    """Whatever drew random numbers before."""
    starts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        module = LitPhi2(base=str(phi_dir), dtype="float32")
        module.configure_model()
        starts.append(weights_of(module))
    assert all(torch.equal(weight, starts[1][name]) for name, weight in starts[0].items())


@pytest.mark.parametrize(
    ("targets", "available", "message"),
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
def test_a_target_without_effect_is_refused(targets: list[str], available: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_targets(targets, available, 2)


def test_an_adapter_survives_being_written_and_read(phi_dir: Path, tmp_path: Path) -> None:
    """Exactly, through q_proj, k_proj and v_proj."""
    module = new_module(phi_dir)
    adapter = module.trained_adapter()
    save_adapter(adapter, tmp_path)
    loaded = read_adapter(tmp_path)
    assert all(torch.equal(weight, loaded.weights[name]) for name, weight in adapter.weights.items())
    assert loaded.settings == adapter.settings
    assert (loaded.base, loaded.template_version) == (adapter.base, adapter.template_version)
    (tmp_path / "lit_phi2.json").unlink()  # as other tools write it
    plain = read_adapter(tmp_path)
    assert set(plain.weights) == set(adapter.weights)
    assert (plain.settings.lora_r, set(plain.settings.target_modules)) == (4, {"Wqkv", "fc1", "fc2"})


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))


def test_a_lora_variant_is_refused(phi_dir: Path, tmp_path: Path) -> None:
    save_adapter(new_module(phi_dir).trained_adapter(), tmp_path)
    (tmp_path / "lit_phi2.json").unlink()  # as other tools write it
    edit_config(tmp_path, use_dora=True)
    with pytest.raises(InputError, match="use_dora is true; expected false"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("change", [{"lora_alpha": 16}, {"r": 2}, {"target_modules": ["fc1"]}, {"some_key": None}])
def test_a_changed_adapter_config_is_noticed(change: dict[str, object], phi_dir: Path, tmp_path: Path) -> None:
    """Alpha alone doubles every update of the same weights."""
    save_adapter(new_module(phi_dir).trained_adapter(), tmp_path)
    edit_config(tmp_path, **change)
    with pytest.raises(InputError, match=r"adapter_config\.json was changed: their digest is"):
        read_adapter(tmp_path)


def test_only_values_count_for_the_digest(phi_dir: Path, tmp_path: Path) -> None:
    """Another order of keys or other white space says the same."""
    adapter = new_module(phi_dir).trained_adapter()
    save_adapter(adapter, tmp_path)
    for name in ("adapter_config.json", "lit_phi2.json"):
        content = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps(dict(reversed(content.items())), indent=7))
    assert read_adapter(tmp_path).settings == adapter.settings


def test_an_adapter_of_the_former_format_says_how_to_use_it(phi_dir: Path, tmp_path: Path) -> None:
    """Its digest covered the weights alone, and its base's digest a part of the base: neither can be compared."""
    adapter = new_module(phi_dir).trained_adapter()
    save_adapter(adapter, tmp_path)
    former = {**adapter.base, "lora_r": 4, "lora_alpha": 8, "template_version": 1, "weights_digest": "0" * 64}
    (tmp_path / "lit_phi2.json").write_text(json.dumps(former))
    with pytest.raises(InputError, match=r"its format is 1, this one reads 2\. Train again, or remove lit_phi2\.json"):
        read_adapter(tmp_path)
    (tmp_path / "lit_phi2.json").unlink()
    assert read_adapter(tmp_path).base["base_digest"] == ""


def test_a_projection_alone_is_never_dropped(phi_dir: Path, tmp_path: Path) -> None:
    """v_proj without q_proj would have no place in Wqkv."""
    save_adapter(new_module(phi_dir).trained_adapter(), tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "q_proj" not in name and "k_proj" not in name}
    save_file(kept, tmp_path / "adapter_model.safetensors")
    (tmp_path / "lit_phi2.json").unlink()  # as other tools write it: no digest
    edit_config(tmp_path, target_modules=["fc1", "fc2"])
    with pytest.raises(
        InputError, match=r"do not select 'model\.layers\.\d\.self_attn\.v_proj', but there is a weight"
    ):
        read_adapter(tmp_path)


def test_weights_that_do_not_fit_are_named(phi_dir: Path) -> None:
    module = new_module(phi_dir)
    weights = weights_of(module)
    first = next(iter(weights))
    missing = {name: weight for name, weight in weights.items() if name != first}
    for wrong, message in (
        (missing, "has no weight"),
        (weights | {"stranger": torch.zeros(1)}, "has a weight 'stranger' that this adapter does not have"),
        (weights | {first: weights[first][:, :-1]}, r"has shape \(4, 63\); expected \(4, 64\)"),
    ):
        with pytest.raises(InputError, match=message):
            load_adapter_state_dict(module.phi, wrong, source="x.ckpt")


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match=r"x\.ckpt: is not a complete checkpoint"):
        read_adapter(tmp_path / "x.ckpt")
    with pytest.raises(InputError, match=r"adapter_config\.json: cannot be read"):
        read_adapter(tmp_path)


def test_a_checkpoint_of_another_format_is_refused(
    phi_dir: Path, write_jsonl: object, record_rows: object, tmp_path: Path
) -> None:
    """Format 1 wrote sentences as keys and no format_version; its digest is right."""
    data = new_data(phi_dir, write_jsonl(record_rows))  # type: ignore[operator]  # a fixture
    new_trainer(tmp_path, keep=True, max_steps=1).fit(new_module(phi_dir), data)
    last = tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt"
    adapter, checkpoint = read_checkpoint(last)
    assert adapter.settings.lora_r == 4
    del checkpoint["lit_phi2"]["format_version"]
    torch.save({**checkpoint, "digest": tree_digest(checkpoint)}, last)
    with pytest.raises(InputError, match=r"last\.ckpt: is a checkpoint of another lit_phi2: its format is 1"):
        read_checkpoint(last)
