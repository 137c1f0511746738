"""GGUF files: what the package gguf reads from them, what is imported again, and hostile ones."""

import contextlib
import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from export.support import WIDTH, random_adapter
from lit_phi2.adapters.adapter import Adapter
from lit_phi2.errors import InputError
from lit_phi2.export.exporter import plan_export
from lit_phi2.export.gguf import write_gguf_adapter, write_gguf_model
from lit_phi2.export.gguf_reader import read_gguf
from lit_phi2.export.imports import read_gguf_adapter
from lit_phi2.export.weights import ModelWeights
from lit_phi2.model.lora import LoraSettings
from lit_phi2.pretrained import BaseModel, resolve_base_model

HEADER = struct.Struct("<4sIQQ")


@pytest.fixture(scope="session")
def adapter_file(adapter: Adapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "adapter.gguf"
    write_gguf_adapter(adapter, 2, path)
    return path


@pytest.mark.runtimes
def test_the_scale_is_multiplied_into_b(adapter: Adapter, adapter_file: Path) -> None:
    """Read by the package gguf: alpha / r is 8 / 4, so B is doubled, and alpha is r."""
    import gguf

    reader = gguf.GGUFReader(adapter_file)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert reader.fields["adapter.lora.alpha"].contents() == 4.0
    weights = {name.removeprefix("base_model.model.model."): w for name, w in adapter.weights.items()}
    a, b = (weights[f"layers.1.self_attn.Wqkv.lora_{x}.weight"].numpy() for x in "AB")
    assert np.array_equal(tensors["blk.1.attn_k.weight.lora_a"], a)
    assert np.array_equal(tensors["blk.1.attn_k.weight.lora_b"], 2 * b[WIDTH : 2 * WIDTH])
    assert len(tensors) == 2 * 2 * 6  # A and B, two layers, q k v dense fc1 fc2


@pytest.mark.runtimes
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
def test_our_reader_and_the_package_read_the_same(
    dtype: str, export_base: BaseModel, export_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Reference: gguf's own reader and dequantization."""
    import gguf

    path = tmp_path / "model.gguf"
    write_gguf_model(ModelWeights(export_base, None), export_tokenizer, path, dtype)
    keys, tensors = read_gguf(path)
    reader = gguf.GGUFReader(path)
    expected = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype("f4") for t in reader.tensors}
    assert tensors.keys() == expected.keys()
    assert all(np.array_equal(tensors[name].to_torch().numpy(), expected[name]) for name in tensors)
    assert keys["tokenizer.ggml.tokens"] == reader.fields["tokenizer.ggml.tokens"].contents()
    assert keys["phi2.rope.dimension_count"] == 32  # half of 64


@pytest.mark.runtimes
def test_an_exported_adapter_imports_as_itself(adapter: Adapter, adapter_file: Path) -> None:
    """Bit for bit, since alpha / r is a power of two."""
    imported = read_gguf_adapter(adapter_file)
    assert (imported.settings, imported.base) == (adapter.settings, adapter.base)
    assert imported.template_version == adapter.template_version
    assert imported.weights.keys() == adapter.weights.keys()
    assert all(torch.equal(weight, adapter.weights[name]) for name, weight in imported.weights.items())


@pytest.mark.runtimes
@pytest.mark.parametrize("use_rslora", [False, True])
def test_any_scale_imports_to_one_rounding(use_rslora: bool, export_base: BaseModel, tmp_path: Path) -> None:
    """alpha / r = 5 / 3: B is rounded when the scale is multiplied in, and once more when it is taken out."""
    adapter = random_adapter(export_base, LoraSettings(3, 5, ("Wqkv", "fc1"), use_rslora))
    write_gguf_adapter(adapter, 2, tmp_path / "adapter.gguf")
    imported = read_gguf_adapter(tmp_path / "adapter.gguf")
    assert imported.settings == adapter.settings
    for name, weight in imported.weights.items():
        torch.testing.assert_close(weight, adapter.weights[name], rtol=2**-22, atol=0)


@pytest.mark.runtimes
def test_a_flipped_bit_is_found(adapter_file: Path, tmp_path: Path) -> None:
    content = bytearray(adapter_file.read_bytes())
    content[-100] ^= 1
    (tmp_path / "adapter.gguf").write_bytes(content)
    with pytest.raises(InputError, match="is damaged"):
        read_gguf_adapter(tmp_path / "adapter.gguf")


@pytest.mark.runtimes
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_file_is_read_or_refused(data: st.DataObject, adapter_file: Path, tmp_path: Path) -> None:
    """Any bytes in the first 4 KB, where all counts, lengths and offsets are: no other exception, and no long loop."""
    content = bytearray(adapter_file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, 4096))
        content[position : position + 8] = data.draw(st.binary(min_size=1, max_size=8))
    path = tmp_path / "changed.gguf"
    path.write_bytes(bytes(content[: data.draw(st.integers(1, len(content)))]))
    with contextlib.suppress(InputError):
        read_gguf_adapter(path)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a GGUF file"),
        (b"PK\x03\x04 something else", "does not begin with GGUF"),
        (HEADER.pack(b"GGUF", 3, 2**60, 0), "claims 1152921504606846976 tensors"),
        (HEADER.pack(b"GGUF", 9, 0, 0), "version is 9"),
        # The package's own reader counts to 2**60 here.
        (HEADER.pack(b"GGUF", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, 0, 2**60), "claims 1152921504606846976"),
        (HEADER.pack(b"GGUF", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, 8, 2**60), "array of 1152921504606846976"),
        (HEADER.pack(b"GGUF", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, 9, 1), "values of type 9"),
        (HEADER.pack(b"GGUF", 3, 0, 1) + struct.pack("<Q", 2**62), "name of 4611686018427387904 bytes"),
        (HEADER.pack(b"GGUF", 3, 0, 2) + 2 * (text("k") + struct.pack("<IB", 0, 1)), "'k' twice"),
        (HEADER.pack(b"GGUF", 3, 1, 0) + text("t") + struct.pack("<IQIQ", 1, 2**61, 0, 0), "is not inside the file"),
        (HEADER.pack(b"GGUF", 3, 1, 0) + text("t") + struct.pack("<I", 2**31), "claims 2147483648 dimensions"),
        (HEADER.pack(b"GGUF", 3, 1, 0) + text("t") + struct.pack("<IQQIQ", 2, 0, 4, 0, 0) + bytes(64), "no elements"),
        (HEADER.pack(b"GGUF", 3, 0, 0), "general.architecture is None"),
    ],
)
def test_a_hostile_file_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "adapter.gguf").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_gguf_adapter(tmp_path / "adapter.gguf")
    assert "adapter.gguf" in str(error.value)


@pytest.mark.runtimes
def test_an_adapter_of_another_tool_is_refused(adapter: Adapter, tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "adapter.gguf", "phi2")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="only a GGUF adapter that lit_phi2 wrote"):
        read_gguf_adapter(tmp_path / "adapter.gguf")


def test_a_base_that_llama_cpp_tokenizes_otherwise_is_refused(
    tiny_base: BaseModel, tiny_adapter: Adapter, tmp_path: Path
) -> None:
    """The tiny base splits digits two by two, which no splitter of llama.cpp does."""
    for format in ("gguf", "gguf-merged"):
        with pytest.raises(InputError, match="tokenizer splits a text before its merges otherwise"):
            plan_export(tiny_adapter, tiny_base, tmp_path / "out", format=format, dtype=None, source="adapter")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type is 'linear'"),
    ],
)
def test_a_base_that_llama_cpp_computes_otherwise_is_refused(
    change: dict[str, object], message: str, export_base: BaseModel, tmp_path: Path
) -> None:
    for file in export_base.folder.iterdir():
        if not file.name.startswith("."):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    base = resolve_base_model(str(tmp_path))
    with pytest.raises(InputError, match=message):
        plan_export(None, base, tmp_path / "out", format="gguf-merged", dtype=None, source="adapter")


def test_an_adapter_for_another_width_is_refused(export_base: BaseModel, adapter: Adapter, tmp_path: Path) -> None:
    narrow = {name: w[:, : WIDTH // 2] if "lora_A" in name else w for name, w in adapter.weights.items()}
    wrong = replace(adapter, weights=narrow, base={**adapter.base, "base_digest": ""})
    for format in ("peft", "merged", "mlx"):
        with pytest.raises(InputError, match="shape"):
            plan_export(wrong, export_base, tmp_path / "out", format=format, dtype=None, source="adapter")


def test_an_adapter_of_another_base_is_refused(tiny_base: BaseModel, adapter: Adapter, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="was trained on"):
        plan_export(adapter, tiny_base, tmp_path / "out", format="merged", dtype=None, source="adapter")
