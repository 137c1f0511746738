"""Files from strangers: pickles with a payload, damaged or foreign adapters, configs that would run code.

A payload that runs creates a canary file.
"""

import json
import pickle
import random
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from helpers import new_data, new_module, new_trainer
from lit_phi2.adapters.checkpoint import read_adapter
from lit_phi2.cli.main import main
from lit_phi2.errors import InputError
from lit_phi2.utils.files import tree_digest

NUM_FLIPS = 40  # of one bit each, in each file


class Payload:
    """Creates the canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


@pytest.fixture(scope="module")
def run(phi_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run."""
    folder = tmp_path_factory.mktemp("trained")
    records = [
        {"instruction": f"Why was claim {n} denied?", "response": f"Plan {n} asks for a notice."} for n in range(6)
    ]
    train = folder / "records.jsonl"
    train.write_text("".join(json.dumps(record) + "\n" for record in records))
    new_trainer(folder, keep=True).fit(new_module(phi_dir), new_data(phi_dir, train))
    return folder / "run" / "version_0"


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The error message of a command that ends with exit code 2 and no traceback."""
    capsys.readouterr()
    assert main(arguments) == 2
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr
    return stderr


def test_a_pickle_as_a_checkpoint_is_refused_unexecuted(
    run: Path, phi_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    canary = tmp_path / "canary"
    plain, zipped = tmp_path / "plain.ckpt", tmp_path / "zipped.ckpt"
    plain.write_bytes(pickle.dumps(Payload(canary)))
    whole = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save({**whole, "callbacks": Payload(canary)}, zipped)
    for file in (plain, zipped):
        for command in (["fit"], ["validate"], ["predict"], ["export", "--output_dir", str(tmp_path / "out")]):
            message = error_of([*command, "--ckpt_path", str(file), "--model.base", str(phi_dir)], capsys)
            assert f"{file}: is not a complete checkpoint" in message
        message = error_of(["fit", "--model.adapter", str(file), "--model.base", str(phi_dir)], capsys)
        assert f"{file}: is not a complete checkpoint" in message
    assert not canary.exists()
    with pytest.raises(pickle.UnpicklingError):  # shows that the payload works
        torch.load(zipped, weights_only=True)
    torch.load(zipped, weights_only=False)
    assert canary.exists()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_a_pickle_in_an_adapter_folder_is_refused_unexecuted(
    name: str, run: Path, phi_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    canary, folder = tmp_path / "canary", tmp_path / "adapter"
    shutil.copytree(run / "adapter", folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Payload(canary)))
    message = error_of(["predict", "--ckpt_path", str(folder), "--model.base", str(phi_dir)], capsys)
    assert f"{folder}: is not a folder with a complete adapter" in message
    assert not canary.exists()


@pytest.mark.parametrize(
    "part",
    [
        "checkpoints/last.ckpt",
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "adapter/lit_phi2.json",
    ],
)
def test_a_flipped_bit_or_a_truncated_file_is_refused(part: str, run: Path, tmp_path: Path) -> None:
    """For any bit: the file is refused, or the adapter is unchanged, with all that is said about it."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    file = copy / part
    readable = file if file.suffix == ".ckpt" else file.parent
    expected, content = read_adapter(readable), file.read_bytes()
    rng, messages = random.Random(0), list[str]()
    for _ in range(NUM_FLIPS):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        try:
            adapter = read_adapter(readable)
        except InputError as error:
            messages.append(str(error))
        else:
            assert all(torch.equal(adapter.weights[name], weight) for name, weight in expected.weights.items())
            assert replace(adapter, weights={}) == replace(expected, weights={})
    assert len(messages) > 0.5 * NUM_FLIPS
    assert all(str(readable) in message for message in messages)
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"is not (a|valid JSON)"):
        read_adapter(readable)


def test_an_unfit_adapter_is_refused_with_its_first_mismatch(
    run: Path, phi_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(run / "adapter", folder)
    (folder / "lit_phi2.json").unlink()  # as another library writes it: no digest
    weights = load_file(folder / "adapter_model.safetensors")
    first = next(name for name in sorted(weights) if "fc1.lora_A" in name)
    save_file({**weights, first: weights[first][:, :-1].contiguous()}, folder / "adapter_model.safetensors")
    arguments = ["fit", "--model.base", str(phi_dir), "--model.lora_r=4", "--model.lora_alpha=8"]
    arguments += ["--data.max_length=512", "--trainer.default_root_dir", str(tmp_path / "runs")]
    message = error_of([*arguments, "--model.adapter", str(folder)], capsys)
    assert f"weight {first!r} has shape (4, 63); expected (4, 64)" in message
    message = error_of(["fit", "--model.base=tiny", *arguments[3:], "--model.adapter", str(run / "adapter")], capsys)
    assert "was trained on" in message
    assert "but model.base is 'tiny'" in message


def test_a_checkpoint_of_the_former_format_is_refused(
    run: Path, phi_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reference: a checkpoint without format_version, with a valid digest, as the former lit_phi2 wrote it."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    del checkpoint["digest"], checkpoint["lit_phi2"]["format_version"]
    file = tmp_path / "former.ckpt"
    torch.save({**checkpoint, "digest": tree_digest(checkpoint)}, file)
    for command in ("fit", "predict"):
        message = error_of([command, "--ckpt_path", str(file), "--model.base", str(phi_dir)], capsys)
        (line,) = (line for line in message.splitlines() if line.startswith("error: "))
        assert f"{file}: is a checkpoint of another lit_phi2: its format is 1, this one reads 3" in line


HOSTILE_CONFIGS = {
    "a hook that is subprocess.call": {
        "callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.LambdaCallback",
                "init_args": {"on_fit_start": "subprocess.call"},
            }
        ]
    },
    "os.system": {"logger": {"class_path": "os.system", "init_args": {"command": "touch CANARY"}}},
    "a strategy that is not one": {
        "strategy": {"class_path": "subprocess.Popen", "init_args": {"args": "touch CANARY"}}
    },
    "a module of the standard library": {"profiler": {"class_path": "code.interact"}},
}


@pytest.mark.parametrize("kind", HOSTILE_CONFIGS)
def test_a_config_that_would_run_code_is_refused_with_the_flag(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "hostile.yaml"
    config.write_text(yaml.safe_dump({"trainer": HOSTILE_CONFIGS[kind]}))
    for command in ("fit", "inspect", "export"):
        more = ["--ckpt_path=x", "--output_dir=y"] if command == "export" else []
        message = error_of([command, "--config", str(config), *more], capsys)
        assert "a config may name only" in message
        assert "--allow_classes" in message
    assert [path.name for path in tmp_path.iterdir()] == ["hostile.yaml"]


def test_an_allowed_class_cannot_call_another_function(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "hostile.yaml"
    config.write_text(yaml.safe_dump({"trainer": HOSTILE_CONFIGS["a hook that is subprocess.call"]}))
    allowed = "lightning.pytorch.callbacks.LambdaCallback,lightning.pytorch.callbacks.lambda_function.LambdaCallback"
    message = error_of(["inspect", "--config", str(config), "--allow_classes", allowed], capsys)
    assert "subprocess.call" in message
    message = error_of(["inspect", "--config", str(config)], capsys)
    assert "a config may name only" in message  # what one command line allows, the next in this process does not


def test_control_characters_of_records_are_escaped_on_terminals(
    phi_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Escapes, a bell, C1 codes and direction marks, in every field of a record that is printed."""
    nasty = "\x1b]0;title\x07\x1b[2J\x9b31m\u202e\u200b"
    record = {"id": f"one{nasty}", "instruction": f"Why{nasty}?", "response": f"So{nasty}.", "category": f"c{nasty}"}
    facts = [{"text": f"fact{nasty}", "kind": f"kind{nasty}"}]
    file = tmp_path / "records.jsonl"
    file.write_text(json.dumps({**record, "facts": facts}) + "\n" + json.dumps({**record, nasty: nasty}) + "\n")
    fixed = ["--model.base", str(phi_dir), "--data.max_length=256", "--model.max_new_tokens=4"]
    fixed += ["--data.train_files", str(file), "--data.val_files", str(file), "--data.test_files", str(file)]
    fixed += ["--trainer.default_root_dir", str(tmp_path / "runs")]
    capsys.readouterr()
    assert main(["inspect", *fixed]) == 2  # the id is used twice
    assert main(["inspect", *fixed, "--data.on_bad_record=skip"]) == 0
    assert main(["test", *fixed, "--data.on_bad_record=skip"]) == 0
    printed = "".join(capsys.readouterr())
    assert r"\x1b" in printed
    assert not [c for c in printed if not c.isprintable() and c not in "\n\t\r"]


def test_all_subcommands_run_without_a_network(
    run: Path, phi_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection was attempted")

    for name in ("connect", "connect_ex", "bind", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    file = str(run.parent.parent / "records.jsonl")
    files = [f"--data.{split_name}_files={file}" for split_name in ("train", "val", "test", "predict")]
    fixed = ["--model.base", str(phi_dir), "--data.max_length=128", "--model.max_new_tokens=4", *files]
    fixed += ["--trainer.default_root_dir", str(tmp_path / "runs"), "--run_name=alone", "--trainer.max_epochs=1"]
    for command in ("fit", "validate", "test", "predict"):
        more = [] if command == "fit" else ["--ckpt_path=last"]
        assert main([command, *fixed, *more]) == 0


@pytest.fixture(autouse=True)
def _errors_without_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIT_PHI2_TRACEBACK", raising=False)
