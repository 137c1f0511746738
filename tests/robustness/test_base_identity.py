"""Which base a command uses: always that of model.base, and only the one that the adapter was trained on."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import new_data, new_module, new_trainer
from lit_phi2.cli.main import main
from lit_phi2.pretrained import resolve_base_model

COMMANDS = ("fit", "validate", "test", "predict", "export")


@pytest.fixture(scope="module")
def base(phi_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of its own, in which a test may change a file and put it back."""
    folder = tmp_path_factory.mktemp("bases") / "trained_on"
    shutil.copytree(phi_dir, folder)
    return folder


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on that base."""
    folder = tmp_path_factory.mktemp("trained")
    rows = [{"instruction": f"Why was claim {n} denied?", "response": f"Plan {n} asks."} for n in range(4)]
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = new_trainer(folder, keep=True, max_steps=2)
    trainer.fit(new_module(base), new_data(base, folder / "records.jsonl"))
    return folder / "run" / "version_0"


@pytest.fixture
def arguments(run: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """A command line on the run's last.ckpt, or on another adapter; without a base."""

    def make(name: str, checkpoint: Path | None = None) -> list[str]:
        files = [f"--data.{split}_files={run.parents[1] / 'records.jsonl'}" for split in ("train", "val", "test")]
        fixed = [f"--ckpt_path={checkpoint or run / 'checkpoints' / 'last.ckpt'}", *files, "--model.dtype=float32"]
        fixed += [f"--data.predict_files={run.parents[1] / 'records.jsonl'}", "--trainer.accelerator=cpu"]
        fixed += [
            "--model.max_new_tokens=4",
            "--data.max_length=128",
            f"--trainer.default_root_dir={tmp_path / 'runs'}",
        ]
        more = {"predict": [f"--output={tmp_path / 'out.jsonl'}"], "export": [f"--output_dir={tmp_path / 'out'}"]}
        return [name, *fixed, *more.get(name, [])]

    return make


def nudge_a_weight(base: Path) -> Path:
    file = base / "model.safetensors"
    weights = load_file(file)
    bias = weights["model.layers.0.mlp.fc2.bias"]
    bias[0] = torch.nextafter(bias[0], torch.tensor(1.0))
    save_file(weights, file, {"format": "pt"})
    return file


def edit_json(file: Path, key: str, value: object) -> Path:
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {key: value}), "utf-8")
    return file


CHANGES: dict[str, Callable[[Path], Path]] = {
    "weights": nudge_a_weight,
    "config": lambda base: edit_json(base / "config.json", "layer_norm_eps", 2e-5),
    "tokenizer": lambda base: edit_json(base / "tokenizer_config.json", "add_prefix_space", True),
}


@pytest.mark.parametrize("part", CHANGES)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_changed_base_is_refused_by_what_changed(
    name: str,
    part: str,
    base: Path,
    arguments: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """In the folder that the run was trained on: resumed, measured, predicted with or exported, nothing is accepted."""
    before = resolve_base_model(str(base)).digest
    backup = tmp_path / "backup"
    shutil.copytree(base, backup)
    file = CHANGES[part](base)
    try:
        assert main([*arguments(name), f"--model.base={base}"]) == 2
        after = resolve_base_model(str(base)).digest
    finally:
        shutil.copy(backup / file.name, file)
    message = capsys.readouterr().err
    assert f"digest {before}" in message
    assert f"digest {after}" in message
    assert f"The {part} of this base changed since then" in message


def test_the_same_base_in_another_folder_is_accepted(
    base: Path, arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    """The exported adapter names the folder that the user gave, by its last part: no path leaves the machine."""
    shutil.copytree(base, tmp_path / "moved")
    for name in ("predict", "export"):
        assert main([*arguments(name), f"--model.base={tmp_path / 'moved'}"]) == 0
    exported = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert exported["base_model_name_or_path"] == "moved"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_on_another_base_says_which_base_to_give(
    name: str, base: Path, arguments: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --model.base the config's is tiny, and the checkpoint does not replace it."""
    assert main(arguments(name)) == 2
    message = capsys.readouterr().err
    for name_of_base in (str(base), "tiny"):
        assert f"'{name_of_base}' (digest {resolve_base_model(name_of_base).digest})" in message
    assert f"Give its own base: --model.base {base}." in message


@pytest.mark.parametrize("claims", ["somebody/phi-with-a-payload", "/nowhere/phi", "", None])
def test_a_foreign_adapter_is_used_on_the_configured_base(
    claims: str | None,
    base: Path,
    run: Path,
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As plain PEFT writes it. The base that it names is neither looked up nor fetched; one line says so."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection was attempted")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    adapter = tmp_path / f"adapter_{claims is None}_{len(claims or '')}"
    shutil.copytree(run / "adapter", adapter)
    (adapter / "lit_phi2.json").unlink()
    (adapter / "provenance.json").unlink()
    edit_json(adapter / "adapter_config.json", "base_model_name_or_path", claims)
    assert main([*arguments("predict", adapter), f"--model.base={base}"]) == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "nothing shows which base" in line)
    assert f"(it names {claims or ''!r}); model.base {str(base)!r} is used" in line
    completions = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").unlink()
    assert main([*arguments("predict", run / "adapter"), f"--model.base={base}"]) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == completions


def test_an_exported_foreign_adapter_stays_unverified(
    base: Path, run: Path, arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Export names the configured base, but does not claim that the adapter was trained on it."""
    adapter = tmp_path / "foreign"
    shutil.copytree(run / "adapter", adapter)
    (adapter / "lit_phi2.json").unlink()
    (adapter / "provenance.json").unlink()
    edit_json(adapter / "adapter_config.json", "base_model_name_or_path", "somebody/phi")
    assert main([*arguments("export", adapter), f"--model.base={base}"]) == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == base.name
    assert json.loads((tmp_path / "out" / "lit_phi2.json").read_text())["base_digest"] == ""


def test_the_name_of_a_base_is_escaped_on_terminals(
    base: Path, run: Path, arguments: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nasty = "\x1b]0;title\x07'; rm -rf ~ #"
    adapter = tmp_path / "nasty"
    shutil.copytree(run / "adapter", adapter)
    (adapter / "lit_phi2.json").unlink()
    (adapter / "provenance.json").unlink()
    edit_json(adapter / "adapter_config.json", "base_model_name_or_path", nasty)
    assert main([*arguments("predict", adapter), f"--model.base={base}"]) == 0
    printed = capsys.readouterr().err
    assert "\x1b" not in printed
    assert "\x07" not in printed


@pytest.fixture(autouse=True)
def _errors_without_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIT_PHI2_TRACEBACK", raising=False)
