"""Loading a base: weights are copied, nothing is computed, and what does not fit is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PhiConfig, PhiForCausalLM

from lit_phi2.errors import InputError
from lit_phi2.model.loading import check_weights, linear_layers, load_phi2
from lit_phi2.model.phi2 import FusedPhiForCausalLM
from lit_phi2.pretrained import BaseModel, load_tokenizer, resolve_base_model


def test_wqkv_holds_the_rows_of_q_then_k_then_v(phi_dir: Path, base: BaseModel) -> None:
    """Reference: the native class on the same files; bit for bit."""
    native = PhiForCausalLM.from_pretrained(phi_dir, dtype=torch.float32)
    fused = load_phi2(base, torch.float32)
    for old, new in zip(native.model.layers, fused.model.layers, strict=True):
        attention = old.self_attn
        for part in ("weight", "bias"):
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            expected = torch.cat([getattr(projection, part) for projection in projections])
            assert torch.equal(getattr(new.self_attn.Wqkv, part), expected)
    assert fused.num_parameters() == native.num_parameters()


def test_sharded_float16_loads_like_a_single_file(phi_dir: Path, base: BaseModel, tmp_path: Path) -> None:
    """Phi-2 itself comes in two shards of float16; the tolerance is the rounding to float16 of weights below 1."""
    native = PhiForCausalLM.from_pretrained(phi_dir, dtype=torch.float16)
    native.save_pretrained(tmp_path, max_shard_size="300KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((phi_dir / name).read_bytes())
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    sharded = load_phi2(resolve_base_model(str(tmp_path)), torch.float32)
    for name, parameter in load_phi2(base, torch.float32).named_parameters():
        torch.testing.assert_close(sharded.get_parameter(name), parameter, rtol=2**-11, atol=1e-7)


def test_linear_layers_are_known_without_loading(base: BaseModel) -> None:
    assert linear_layers(base) == {"Wqkv": 2, "dense": 2, "fc1": 2, "fc2": 2}


def test_grouped_keys_are_refused(phi_dir: Path) -> None:
    config = PhiConfig.from_pretrained(phi_dir)
    config.num_key_value_heads = 2
    with pytest.raises(InputError, match="as many key as query heads"):
        FusedPhiForCausalLM(config)


def test_the_tiny_phi_is_native_with_eos_and_no_pad_token() -> None:
    tiny = resolve_base_model("tiny")
    model = PhiForCausalLM.from_pretrained(tiny.folder)
    tokenizer = load_tokenizer(tiny)
    assert 5_000_000 <= model.num_parameters() <= 10_000_000
    assert sum(path.stat().st_size for path in tiny.folder.iterdir()) < 20_000_000
    assert model.config.max_position_embeddings >= 1024
    assert tokenizer.eos_token_id == model.config.eos_token_id
    assert tokenizer.pad_token is None
    text = "Claim 4417: naïve, £9 €8\n\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_only_a_copy_of_a_base_has_its_digest(base: BaseModel, phi_dir: Path, tmp_path: Path) -> None:
    for path in phi_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert resolve_base_model(str(tmp_path)).digest == base.digest
    model = PhiForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25)
    model.save_pretrained(tmp_path)
    assert resolve_base_model(str(tmp_path)).digest != base.digest


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), "model_type is 'llama'"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"neither model\.safetensors nor"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json"),
    ],
)
def test_a_folder_without_a_phi_is_refused_with_the_reason(
    damage: object, message: str, phi_dir: Path, tmp_path: Path
) -> None:
    for path in phi_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damage(tmp_path)
    with pytest.raises(InputError, match=message):
        resolve_base_model(str(tmp_path))


def test_a_missing_weight_is_refused_not_randomly_filled(phi_dir: Path, tmp_path: Path) -> None:
    for path in phi_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.fc1.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"missing keys, the first of 1 is model\.layers\.1\.mlp\.fc1\.weight"):
        load_phi2(resolve_base_model(str(tmp_path)), torch.float32)
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(InputError, match="cannot be read"):
        load_phi2(resolve_base_model(str(tmp_path)), torch.float32)


def copy_sharded(phi_dir: Path, folder: Path) -> list[str]:
    """The base in several weight files; returns their names."""
    PhiForCausalLM.from_pretrained(phi_dir).save_pretrained(folder, max_shard_size="300KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((phi_dir / name).read_bytes())
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_weights_that_the_index_does_not_list_are_not_read(phi_dir: Path, tmp_path: Path) -> None:
    """An adapter's, or a copy in another format; they change neither the model nor the digest."""
    copy_sharded(phi_dir, tmp_path)
    before = resolve_base_model(str(tmp_path))
    expected = load_phi2(before, torch.float32).state_dict()
    save_file({"lm_head.bias": torch.ones(8)}, tmp_path / "consolidated.safetensors")
    after = resolve_base_model(str(tmp_path))
    assert after.digest == before.digest
    assert all(
        torch.equal(weight, expected[name]) for name, weight in load_phi2(after, torch.float32).state_dict().items()
    )


def test_two_sets_of_weights_are_refused(phi_dir: Path, tmp_path: Path) -> None:
    """transformers reads model.safetensors where there is also an index of other files."""
    copy_sharded(phi_dir, tmp_path)
    (tmp_path / "model.safetensors").write_bytes((phi_dir / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"has model\.safetensors and an index of other files"):
        resolve_base_model(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda weight: weight[:-1].contiguous(), "mismatched keys"),
        (lambda weight: weight.to(torch.int8), "integer keys"),
        (lambda weight: weight.to(torch.float8_e4m3fn), "integer keys"),
    ],
)
def test_a_weight_of_another_shape_or_kind_is_named(
    change: object, problem: str, phi_dir: Path, tmp_path: Path
) -> None:
    """Integers and 8-bit floats need a scale, which a Phi checkpoint does not have."""
    for path in phi_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights, name = load_file(tmp_path / "model.safetensors"), "model.layers.0.mlp.fc1.weight"
    save_file(weights | {name: change(weights[name])}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=rf"{problem}, the first of 1 is {name}"):
        check_weights(resolve_base_model(str(tmp_path)))


def test_a_weight_in_two_files_is_refused(phi_dir: Path, tmp_path: Path) -> None:
    """Which of them counts would depend on the order of the files."""
    first, second, *_ = copy_sharded(phi_dir, tmp_path)
    weights = load_file(tmp_path / first)
    name = min(weights)
    save_file(load_file(tmp_path / second) | {name: weights[name]}, tmp_path / second, {"format": "pt"})
    with pytest.raises(InputError, match=f"repeated keys, the first of 1 is {name}"):
        check_weights(resolve_base_model(str(tmp_path)))


def test_a_base_that_changes_before_it_is_loaded_is_refused(phi_dir: Path, tmp_path: Path) -> None:
    """The digest that a checkpoint stores is that of the weights in memory, not of a newer download."""
    for path in phi_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    base = resolve_base_model(str(tmp_path))
    weights = load_file(tmp_path / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"model\.safetensors changed while it was read"):
        load_phi2(base, torch.float32)


def test_a_missing_shard_is_named(phi_dir: Path, tmp_path: Path) -> None:
    PhiForCausalLM.from_pretrained(phi_dir).save_pretrained(tmp_path, max_shard_size="300KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((phi_dir / name).read_bytes())
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(InputError, match=f"lacks {shard.name}"):
        resolve_base_model(str(tmp_path))
