"""JSON files of a base or an adapter that hold the wrong kind of value: exit 2 with file and key, through the commands.

Each case is a whole content, or one changed value; the reference is the unchanged folder, which every command takes.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PhiForCausalLM

from helpers import new_data, new_module, new_trainer
from lit_phi2.adapters.checkpoint import read_adapter
from lit_phi2.cli.main import main
from lit_phi2.errors import InputError
from lit_phi2.pretrained import load_tokenizer, resolve_base_model

ABSENT = object()
INDEX = "model.safetensors.index.json"
Edit = Callable[[Path], None]

NOT_OBJECTS = {
    "an empty list": "[]",
    "null": "null",
    "a text": '"text"',
    "a number": "5",
    "cut off": '{"a": ',
    "NaN": '{"a": NaN}',
    "not UTF-8": b'{"a": "\xff"}',
    "nested too deeply": "[" * 100_000,
    "empty": "",
}

# file -> (path of the key, value): the message names the last key of the path that is not an index
BASE_VALUES: dict[str, list[tuple[str, Any]]] = {
    "config.json": [
        ("model_type", ABSENT),
        ("model_type", []),
        ("hidden_size", None),
        ("hidden_size", ABSENT),
        ("hidden_size", "64"),
        ("hidden_size", 64.0),
        ("hidden_size", True),
        ("hidden_size", -64),
        ("hidden_size", 10**12),
        ("intermediate_size", [256]),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 0),
        ("num_attention_heads", 3),
        ("num_key_value_heads", 2),
        ("num_key_value_heads", "4"),
        ("head_dim", 0),
        ("vocab_size", -1),
        ("vocab_size", {}),
        ("max_position_embeddings", ABSENT),
        ("max_position_embeddings", "many"),
        ("hidden_act", "gelu_newer"),
        ("hidden_act", 5),
        ("layer_norm_eps", "small"),
        ("layer_norm_eps", 0),
        ("resid_pdrop", 2),
        ("qk_layernorm", True),
        ("tie_word_embeddings", True),
        ("eos_token_id", 10**6),
        ("eos_token_id", -1),
        ("eos_token_id", [0, 10**6]),
        ("eos_token_id", "end"),
        ("rope_parameters", []),
        ("rope_parameters", "default"),
        ("rope_parameters.rope_type", "spiral"),
        ("rope_parameters.rope_type", 5),
        ("rope_parameters.rope_type", "dynamic"),
        ("rope_parameters.rope_theta", "10000"),
        ("rope_parameters.rope_theta", 0),
        ("rope_parameters.partial_rotary_factor", 0),
        ("rope_parameters.partial_rotary_factor", 1.5),
        ("rope_parameters.partial_rotary_factor", 0.19),
        ("rope_scaling", {"type": "linear"}),
        ("rope_scaling", {"type": "linear", "factor": "two"}),
    ],
    "tokenizer.json": [
        ("model", ABSENT),
        ("model", None),
        ("model", []),
        ("model.vocab", ABSENT),
        ("model.vocab", ["a"]),
        ("model.vocab.the", "7"),
        ("model.vocab.the", -1),
        ("model.vocab.the", 10**6),
        ("model.merges", "ab"),
        ("added_tokens", {"a": 1}),
        ("added_tokens", [1]),
        ("added_tokens.0.id", "0"),
        ("added_tokens.0.content", ABSENT),
        ("pre_tokenizer", 5),
    ],
    "tokenizer_config.json": [
        ("eos_token", 5),
        ("eos_token", "<|nowhere|>"),
        ("eos_token", ABSENT),
        ("eos_token", None),
        ("tokenizer_class", []),
        ("added_tokens_decoder", []),
        ("added_tokens_decoder", {"7": "x"}),
        ("fast_tokenizer_files", ["tokenizer.1.0.json"]),
        ("model_max_length", "long"),
    ],
    INDEX: [
        ("weight_map", ABSENT),
        ("weight_map", None),
        ("weight_map", []),
        ("weight_map", {}),
        ("weight_map.lm_head.bias", 5),
        ("weight_map.lm_head.bias", "../outside.safetensors"),
        ("weight_map.lm_head.bias", "/etc/outside.safetensors"),
        ("weight_map.lm_head.bias", "sub/outside.safetensors"),
        ("weight_map.lm_head.bias", "weights.bin"),
    ],
}
ADAPTER_VALUES: dict[str, list[tuple[str, Any]]] = {
    "adapter_config.json": [
        ("peft_type", ABSENT),
        ("peft_type", "IA3"),
        ("r", ABSENT),
        ("r", "two"),
        ("r", None),
        ("r", 0),
        ("r", 2.0),
        ("r", 10**9),
        ("lora_alpha", ABSENT),
        ("lora_alpha", "four"),
        ("lora_alpha", True),
        ("lora_alpha", 2**31),
        ("target_modules", ABSENT),
        ("target_modules", None),
        ("target_modules", "all-linear"),
        ("target_modules", []),
        ("target_modules", [1]),
        ("target_modules", ["q_proj", "v_proj", "fc1", "fc2"]),
        ("base_model_name_or_path", 5),
        ("init_lora_weights", 5),
    ],
    "lit_phi2.json": [
        ("format_version", ABSENT),
        ("format_version", "two"),
        ("base", ABSENT),
        ("base", 5),
        ("base_digest", None),
        ("base_revision", []),
        ("template_version", "one"),
        ("digest", None),
        ("digest", ABSENT),
    ],
}
# Here the reason is that of the tokenizer's library, which names no key, or of several keys.
UNNAMED = {
    "model.merges": "cannot be used",
    "pre_tokenizer": "cannot be used",
    "model.vocab.the": "token",
    "added_tokens.0.id": "added_tokens",
    "added_tokens_decoder": "tokenizer",
}


def cases(values: dict[str, list[tuple[str, Any]]]) -> list[Any]:
    whole = [(file, name, content) for file in values for name, content in NOT_OBJECTS.items()]
    changed = [(file, key, value) for file, pairs in values.items() for key, value in pairs]
    named = [
        pytest.param(file, key, value, id=f"{file}-{key}-{'absent' if value is ABSENT else str(value)[:24]}")
        for file, key, value in whole + changed
    ]
    return named


def change(file: Path, key: str, value: Any) -> None:
    """Write a whole content, or set the value of a key."""
    if key in NOT_OBJECTS:
        file.write_bytes(value if isinstance(value, bytes) else value.encode())
        return
    content = json.loads(file.read_text("utf-8"))
    *parents, last = [key] if key == "weight_map" else _path(key)
    node = content
    for name in parents:
        node = node[int(name) if isinstance(node, list) else name]
    if value is ABSENT:
        node.pop(last, None)
    else:
        node[last] = value
    file.write_text(json.dumps(content), "utf-8")


def _path(key: str) -> list[str]:
    return ["weight_map", key.partition(".")[2]] if key.startswith("weight_map.") else key.split(".")


@pytest.fixture(scope="module")
def sharded_base(phi_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small Phi in several weight files, so that there is an index."""
    folder = tmp_path_factory.mktemp("sharded")
    PhiForCausalLM.from_pretrained(phi_dir).save_pretrained(folder, max_shard_size="300KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(phi_dir / name, folder)
    return folder


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("records") / "records.jsonl"
    rows = [{"instruction": f"Why was claim {n} denied?", "response": f"Plan {n} asks."} for n in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def adapter_dir(sharded_base: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of a short run on the small Phi."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = new_trainer(folder, keep=True, max_steps=1)
    trainer.fit(new_module(sharded_base), new_data(sharded_base, records))
    return folder / "run" / "version_0" / "adapter"


@pytest.fixture
def command(records: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The command line of a subcommand, with everything it needs."""

    def arguments(name: str, base: Path, adapter: Path) -> list[str]:
        files = [f"--data.{split}_files={records}" for split in ("train", "val", "predict")]
        fixed = [f"--model.base={base}", "--model.max_new_tokens=4", "--data.max_length=128", *files]
        fixed += [f"--trainer.default_root_dir={tmp_path / 'runs'}", "--trainer.max_steps=1", "--trainer.max_epochs=1"]
        flags = {
            "fit": [f"--model.adapter={adapter}", "--model.lora_r=4", "--model.lora_alpha=8"],
            "predict": [f"--ckpt_path={adapter}", f"--output={tmp_path / 'predictions.jsonl'}"],
            "export": [f"--ckpt_path={adapter}", f"--output_dir={tmp_path / 'out'}"],
            "inspect": [],
        }
        return [name, *fixed, *flags[name]]

    return arguments


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The error line of a command that ends with exit code 2, without a traceback."""
    capsys.readouterr()
    assert main(arguments) == 2
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr
    return stderr.partition("error: ")[2]


@pytest.mark.parametrize("name", ["inspect", "fit", "predict", "export"])
def test_the_unchanged_files_are_accepted(
    name: str, sharded_base: Path, adapter_dir: Path, command: Callable[..., list[str]]
) -> None:
    assert main(command(name, sharded_base, adapter_dir)) == 0


@pytest.mark.parametrize(("file", "key", "value"), cases(BASE_VALUES))
def test_a_wrong_value_in_a_base_is_named(file: str, key: str, value: Any, sharded_base: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(sharded_base, base)
    change(base / file, key, value)
    with pytest.raises(InputError) as error:
        load_tokenizer(resolve_base_model(str(base)))
    assert str(error.value).startswith(f"model.base: {base}" if key in UNNAMED else f"model.base: {base / file}: ")
    assert key in NOT_OBJECTS or UNNAMED.get(key, _path(key)[-1]) in str(error.value)


@pytest.mark.parametrize(("file", "key", "value"), cases(ADAPTER_VALUES))
def test_a_wrong_value_in_an_adapter_is_named(
    file: str, key: str, value: Any, adapter_dir: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(adapter_dir, adapter)
    if file != "lit_phi2.json":
        (adapter / "lit_phi2.json").unlink()  # as another tool writes it: no digest to notice the change
    change(adapter / file, key, value)
    with pytest.raises(InputError) as error:
        read_adapter(adapter)
    assert str(error.value).startswith(f"{adapter / file}: ")
    assert key in NOT_OBJECTS or ("its format is" if key == "format_version" else key) in str(error.value)


@pytest.mark.parametrize("name", ["inspect", "fit", "predict", "export"])
@pytest.mark.parametrize("file", [*BASE_VALUES, *ADAPTER_VALUES])
def test_every_command_that_reads_a_file_refuses_it(
    name: str,
    file: str,
    sharded_base: Path,
    adapter_dir: Path,
    command: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """inspect reads no adapter. A tokenizer that is not the adapter's is refused by export too, which reads none."""
    if name == "inspect" and file in ADAPTER_VALUES:
        return
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(sharded_base, base)
    shutil.copytree(adapter_dir, adapter)
    change((adapter if file in ADAPTER_VALUES else base) / file, "an empty list", "[]")
    message = refused(command(name, base, adapter), capsys)
    is_seen_by_digest = file.startswith("tokenizer") and name != "inspect"
    assert ("they differ in tokenizer" if is_seen_by_digest else f"{file}: holds a list") in message


def test_sizes_that_the_weights_lack_are_refused_unallocated(
    sharded_base: Path,
    adapter_dir: Path,
    command: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Embeddings of 16 million tokens, 131,072 wide, would take 8.8 TB."""
    base = tmp_path / "base"
    shutil.copytree(sharded_base, base)
    for key, value in (("vocab_size", 2**24), ("hidden_size", 2**17), ("num_hidden_layers", 512)):
        change(base / "config.json", key, value)
    arguments = command("predict", base, adapter_dir)
    message = refused([argument for argument in arguments if "ckpt_path" not in argument], capsys)
    assert "do not match its config.json" in message


def test_a_rank_that_the_weights_lack_is_refused_unallocated(
    sharded_base: Path,
    adapter_dir: Path,
    command: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(adapter_dir, adapter)
    (adapter / "lit_phi2.json").unlink()
    change(adapter / "adapter_config.json", "r", 2**16)
    message = refused(command("predict", sharded_base, adapter), capsys)
    assert "has shape (4, 64); expected (65536, 64)" in message


def test_generation_settings_of_a_base_are_not_read(
    sharded_base: Path, adapter_dir: Path, command: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Completions are greedy whatever generation_config.json and config.json say; reference: the unchanged base."""
    base, completions = tmp_path / "base", list[bytes]()
    shutil.copytree(sharded_base, base)
    for content in ("", "[]", json.dumps({"do_sample": True, "temperature": 9.0, "eos_token_id": 10**6})):
        if content:
            (base / "generation_config.json").write_text(content)
        arguments = command("predict", base, adapter_dir)
        assert main([argument for argument in arguments if "ckpt_path" not in argument]) == 0
        completions.append((tmp_path / "predictions.jsonl").read_bytes())
        (tmp_path / "predictions.jsonl").unlink()
    assert len(set(completions)) == 1


@pytest.fixture(autouse=True)
def _errors_without_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIT_PHI2_TRACEBACK", raising=False)
    torch.manual_seed(0)
