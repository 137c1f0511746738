"""An export as a whole: complete or absent, checked or refused, described, and loaded by its own command."""

import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from export.support import random_adapter, reference_of
from helpers import ROOT
from lit_phi2.adapters.adapter import Adapter, check_adapter
from lit_phi2.adapters.checkpoint import read_adapter
from lit_phi2.adapters.peft_format import save_adapter
from lit_phi2.audit.verify import verify_files
from lit_phi2.errors import InputError
from lit_phi2.export.card import CardFacts
from lit_phi2.export.commands import load_command
from lit_phi2.export.exporter import FORMATS, export, plan_export
from lit_phi2.export.folder import replaced_folder
from lit_phi2.export.parity import compare, divergence
from lit_phi2.export.progress import write_progress
from lit_phi2.export.runtimes import transformers_runtime
from lit_phi2.export.weights import ModelWeights
from lit_phi2.model.lora import LoraSettings
from lit_phi2.pretrained import BaseModel, resolve_base_model

NEED_GGUF = {"gguf", "gguf-merged"}
EVERY_FORMAT = [pytest.param(format, marks=[pytest.mark.runtimes] if format in NEED_GGUF else []) for format in FORMATS]


def export_to(folder: Path, adapter: Adapter | None, base: BaseModel, format: str, **facts: object) -> Path:
    plan = plan_export(adapter, base, folder, format=format, dtype=None, source="adapter")
    export(plan, None, CardFacts(**facts))  # type: ignore[arg-type]
    return folder


@pytest.mark.parametrize("format", EVERY_FORMAT)
def test_every_format_says_what_it_is(format: str, export_base: BaseModel, adapter: Adapter, tmp_path: Path) -> None:
    """The card's metadata are read by the hub's own client."""
    facts = {
        "data_counts": {"train": 4378, "val": 412},
        "metrics": {"test/loss": 1.25},
        "config": {"data": {"train_files": "/home/ann/claims.jsonl"}},
    }
    folder = export_to(tmp_path / "out", adapter, export_base, format, **facts)
    report = json.loads((folder / "export.json").read_text())
    assert report["format"] == format
    assert report["fingerprints"]["base_digest"] == export_base.digest
    assert report["fingerprints"]["template_version"] == 1
    assert len(report["fingerprints"]["adapter_digest"]) == 64
    assert report["check"] == {"method": "none", "summary": "not checked: --check 0"}
    card = ModelCard.load(folder / "README.md")
    assert (card.data.pipeline_tag, card.data.license) == ("text-generation", "unknown")
    for text in ("| train | 4378 |", "| test/loss | 1.25 |", "claims.jsonl", "### Response:", "## Limits"):
        assert text in card.text, text


@pytest.mark.parametrize("format", EVERY_FORMAT)
def test_no_export_names_a_path_of_this_machine(
    format: str, export_base: BaseModel, adapter: Adapter, tmp_path: Path
) -> None:
    """In no file: neither where the base is, which tokenizer_config.json tells too, nor where the records are."""
    home = tmp_path / "ann"
    shutil.copytree(export_base.folder, home / "models" / "my-phi")
    file = home / "models" / "my-phi" / "tokenizer_config.json"
    paths = {"name_or_path": str(file.parent), "special_tokens_map_file": str(file), "tokenizer_file": str(file)}
    file.write_text(json.dumps(json.loads(file.read_text()) | paths))
    base = resolve_base_model(str(file.parent))
    adapter = replace(adapter, base=base.fingerprint())
    config = {"data": {"train_files": [str(home / "claims.jsonl")]}, "model": {"base": str(file.parent)}}
    folder = export_to(tmp_path / "out", adapter, base, format, config=config)
    assert json.loads((folder / "export.json").read_text())["fingerprints"]["base"] == "my-phi"
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert str(tmp_path).encode() not in content, path.name
        assert str(export_base.folder.parent).encode() not in content, path.name


@pytest.mark.runtimes
@pytest.mark.parametrize(("format", "name"), [("gguf", "adapter.gguf"), ("gguf-merged", "model-f16.gguf")])
def test_a_gguf_export_carries_its_provenance(
    format: str, name: str, export_base: BaseModel, adapter: Adapter, tmp_path: Path
) -> None:
    """The reference reads the key with the package gguf."""
    from gguf import GGUFReader

    folder = export_to(tmp_path / "out", adapter, export_base, format)
    statement = json.loads((folder / "provenance.json").read_text())
    embedded = json.loads(GGUFReader(folder / name).fields["lit_phi2.provenance"].contents())
    digest = hashlib.sha256(json.dumps(statement["predicate"], sort_keys=True).encode()).hexdigest()
    assert embedded["predicate_sha256"] == digest
    assert embedded["digests"]["base weights"] == export_base.digest.split("-")[2]
    assert not any(finding.is_fault for finding in verify_files(folder, statement, None))
    statement["predicate"]["export"]["dtype"] = "another"
    faults = [finding for finding in verify_files(folder, statement, None) if finding.is_fault]
    assert [(fault.name, fault.detail) for fault in faults] == [("provenance.json", f"{name} was written with another")]


def test_an_export_without_a_path_still_tells_its_base(
    export_base: BaseModel, tiny_base: BaseModel, adapter: Adapter, tmp_path: Path
) -> None:
    """By its fingerprint; on another base the message has the name of the folder."""
    imported = read_adapter(export_to(tmp_path / "out", adapter, export_base, "peft"))
    check_adapter(imported, imported.settings, export_base, source="adapter")
    with pytest.raises(InputError, match=f"a folder that was named '{export_base.folder.name}'"):
        check_adapter(imported, imported.settings, tiny_base, source="adapter")


def test_the_card_of_a_base_that_is_not_on_the_hub(
    export_base: BaseModel, tiny_base: BaseModel, adapter: Adapter, tiny_adapter: Adapter, tmp_path: Path
) -> None:
    """Its metadata name no base_model, which the hub would take for an id; a sentence says which base it was."""
    for number, (base, trained, sentence) in enumerate(
        [
            (tiny_base, tiny_adapter, "The base `tiny` comes with lit_phi2"),
            (export_base, adapter, f"read from a folder named `{export_base.folder.name}`"),
        ]
    ):
        card = ModelCard.load(export_to(tmp_path / str(number), trained, base, "peft") / "README.md")
        assert card.data.base_model is None
        assert sentence in card.text


def test_a_card_names_a_base_on_the_hub_with_its_licence(
    export_base: BaseModel, adapter: Adapter, tmp_path: Path
) -> None:
    hub_base = replace(export_base, name="microsoft/phi-2", revision="abc")
    adapter = replace(adapter, base=hub_base.fingerprint())
    card = ModelCard.load(export_to(tmp_path / "out", adapter, hub_base, "peft") / "README.md")
    assert (card.data.base_model, card.data.license, card.data.library_name) == ("microsoft/phi-2", "mit", "peft")


def test_an_export_replaces_the_one_before(export_base: BaseModel, adapter: Adapter, tmp_path: Path) -> None:
    folder = export_to(tmp_path / "out", adapter, export_base, "mlx")
    export_to(tmp_path / "out", adapter, export_base, "peft")
    assert (folder / "adapter_model.safetensors").is_file()
    assert not (folder / "adapters.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_with_other_files_is_refused(export_base: BaseModel, adapter: Adapter, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("keep me")
    with pytest.raises(InputError, match="holds files that no export wrote"):
        export_to(tmp_path, adapter, export_base, "peft")
    assert (tmp_path / "notes.txt").read_text() == "keep me"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "onnx"}, "--format onnx: is unknown; expected one of peft, merged, gguf, gguf-merged, mlx"),
        ({"format": "merged", "dtype": "int4"}, "--dtype int4: --format merged has bfloat16, float16, float32"),
        ({"format": "peft", "dtype": "bfloat16"}, "--dtype bfloat16: --format peft has float32"),
        ({"format": "mlx", "adapter": None}, "Give one with --ckpt_path"),
    ],
)
def test_an_export_that_cannot_be_is_refused(
    settings: dict[str, object], message: str, export_base: BaseModel, adapter: Adapter, tmp_path: Path
) -> None:
    arguments = {"adapter": adapter, "dtype": None} | settings
    with pytest.raises(InputError, match=message):
        plan_export(base=export_base, output_dir=tmp_path / "out", source="adapter", **arguments)  # type: ignore[arg-type]


def test_without_the_package_gguf_its_formats_say_so(
    export_base: BaseModel, adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)  # its import then fails
    for format in ("gguf", "gguf-merged"):
        with pytest.raises(InputError, match="pip install gguf"):
            plan_export(adapter, export_base, tmp_path / "out", format=format, dtype=None, source="adapter")


def test_a_result_that_says_something_else_is_refused(export_base: BaseModel, adapter: Adapter, tmp_path: Path) -> None:
    """The running model has half the scale of the adapter that is exported."""
    half = replace(adapter, settings=replace(adapter.settings, lora_alpha=4))
    reference = reference_of(export_base, half, 2, max_tokens=8)
    plan = plan_export(adapter, export_base, tmp_path / "out", format="merged", dtype="float32", source="adapter")
    with pytest.raises(InputError, match=r"refused, because .* greedy completions equal.* KL of 1e-04"):
        export(plan, reference, CardFacts())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", EVERY_FORMAT)
def test_rank_stabilised_scaling_is_right_in_every_format(format: str, export_base: BaseModel, tmp_path: Path) -> None:
    """In its runtime, where that is installed: a scale of alpha / r is 1.7 times too small, and is refused."""
    adapter = random_adapter(export_base, LoraSettings(3, 5, ("Wqkv", "dense", "fc1", "fc2"), use_rslora=True))
    plan = plan_export(adapter, export_base, tmp_path / "out", format=format, dtype=None, source="adapter")
    check = export(plan, reference_of(export_base, adapter, 2, max_tokens=8), CardFacts())
    assert check.method in ("runtime", "read back")
    wrong = replace(adapter, settings=replace(adapter.settings, use_rslora=False))
    if check.method == "runtime":
        with pytest.raises(InputError, match="refused"):
            export(plan, reference_of(export_base, wrong, 2, max_tokens=8), CardFacts())


def test_the_kl_divergence_is_the_closed_form() -> None:
    """Two distributions of three tokens by hand; with the two best alone, the others are one event."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.25, 0.35, 0.4])
    whole = float((p * (p / q).log()).sum())
    assert divergence(p.log(), q.log(), None)[0] == pytest.approx(whole, rel=1e-6)
    ids = torch.tensor([2, 1])
    lumped = 0.2 * torch.tensor(0.5).log() + 0.3 * torch.tensor(0.3 / 0.35).log() + 0.5 * torch.tensor(2.0).log()
    assert divergence(p.log(), q[ids].log(), ids)[0] == pytest.approx(float(lumped), rel=1e-6)
    assert divergence(p.log(), torch.tensor([float("nan"), 0.0, 0.0]), None) == (float("inf"), float("inf"))


def test_a_token_after_a_difference_is_still_compared(export_base: BaseModel, adapter: Adapter, tmp_path: Path) -> None:
    """The base without the adapter says other tokens; every one is compared after the reference's text."""
    reference = reference_of(export_base, adapter, 2, max_tokens=8)
    with transformers_runtime(export_base.folder, "float32", reference) as runtime:
        parity = compare(reference, runtime)
    assert (parity.num_prompts, parity.num_tokens) == (2, 16)
    assert parity.max_kl == pytest.approx(reference.adapter_effect, rel=1e-3)


# One process that forks for each export: importing torch takes longer than the export.
FORKS = """
import json, os, resource, signal, sys
from pathlib import Path
from lit_phi2.adapters.checkpoint import read_adapter
from lit_phi2.export.card import CardFacts
from lit_phi2.export.exporter import export, plan_export
from lit_phi2.pretrained import resolve_base_model

base, adapter, out, format = sys.argv[1:]
base, adapter = resolve_base_model(base), read_adapter(Path(adapter))
plan = plan_export(adapter, base, Path(out), format=format, dtype=None, source="adapter")
EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")

def run(kill_at=0, max_bytes=None):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        count = 0
        def hook(event, arguments):
            nonlocal count
            if event in EVENTS and ".export" in str(arguments[0]):
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        if max_bytes:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, max_bytes))
        try:
            export(plan, None, CardFacts())
            os.write(write, str(count).encode())
        except OSError as error:
            os.write(write, repr(error).encode())
        os._exit(0)
    os.close(write)
    status = os.waitpid(pid, 0)[1]
    text = os.read(read, 1000).decode()
    files = {str(path): path.stat().st_size for path in Path(out).rglob("*") if path.is_file()}
    return {"status": status, "text": text, "files": files, "beside": sorted(os.listdir(Path(out).parent))}

def clear():
    for path in Path(out).glob("*"):
        path.unlink()
    if Path(out).is_dir():
        os.rmdir(out)

whole = run()
clear()
full = run(max_bytes=100_000)
killed = []
for point in range(1, 11):
    clear()
    killed.append(run(kill_at=max(1, int(whole["text"]) * point // 10)))
print(json.dumps({"whole": whole, "full": full, "killed": killed, "last": run()}))
"""


@pytest.mark.parametrize("format", ["merged", pytest.param("gguf-merged", marks=pytest.mark.runtimes)])
def test_a_killed_export_leaves_nothing_that_looks_whole(
    format: str, export_base: BaseModel, adapter: Adapter, tmp_path: Path
) -> None:
    """At ten of its file operations, and with a full disk: absent or whole; the next export removes the rest."""
    save_adapter(adapter, tmp_path / "adapter")
    arguments = [str(export_base.folder), str(tmp_path / "adapter"), str(tmp_path / "out"), format]
    result = subprocess.run([sys.executable, "-c", FORKS, *arguments], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    runs = json.loads(result.stdout)
    expected = runs["whole"]["files"]
    assert runs["whole"]["status"] == 0
    assert len(expected) >= 4
    assert runs["full"]["text"].startswith("OSError")
    assert runs["full"]["beside"] == ["adapter"]
    for run in runs["killed"]:
        assert run["status"] == signal.SIGKILL
        assert run["files"] in ({}, expected)
    assert any(run["files"] == {} and len(run["beside"]) > 1 for run in runs["killed"])
    assert runs["last"]["files"] == expected
    assert runs["last"]["beside"] == ["adapter", "out"]


def test_a_long_write_logs_how_far_it_is(
    export_base: BaseModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a terminal a line after five seconds, of a clock that gains six at each look."""
    caplog.set_level("INFO", "lit_phi2")
    monkeypatch.setattr("time.monotonic", itertools.count(0.0, 6.0).__next__)
    weights = ModelWeights(export_base, None)
    total = sum(shape.numel() * 4 for shape in weights.shapes.values())
    with write_progress(weights, "float32") as advance:
        advance(total // 2)
    assert caplog.messages == [f"written {total / 2e9:.1f} of {total / 1e9:.1f} GB"]


def test_an_export_killed_between_its_renames_comes_back(tmp_path: Path) -> None:
    """The earlier export was moved aside, and the new one did not take its place."""
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced" / "export.json").write_text("earlier")
    with pytest.raises(ValueError, match="stop"), replaced_folder(tmp_path / "out"):
        raise ValueError("stop")
    assert (tmp_path / "out" / "export.json").read_text() == "earlier"


def test_the_readme_loads_exports_as_they_say_themselves() -> None:
    """Its table has the commands that the log ends with, for a folder named out."""
    table = (ROOT / "README.md").read_text("utf-8").partition("## Take it with you")[2].partition("## FAQ")[0]
    rows = [[cell.strip(" `") for cell in line.split("|")[1:4]] for line in table.splitlines() if line.startswith("| ")]
    commands = {name: (format.split("`")[0], command) for name, format, command in rows[1:]}
    assert {format for format, _ in commands.values()} == set(FORMATS)
    assert commands["llama.cpp, adapter"] == ("gguf", load_command("gguf", "float32", "BASE", "out"))
    assert commands["llama.cpp, model"] == ("gguf-merged", load_command("gguf-merged", "float16", "BASE", "out"))
    for format, name in (("mlx", "MLX"), ("peft", "PEFT 0.21.2"), ("merged", "transformers 5.23.0")):
        assert commands[name][0] == format
    assert load_command("mlx", "float32", "BASE", "out").startswith(commands["MLX"][1])
    assert 'pipeline("text-generation", "out")' in load_command("merged", "bfloat16", "BASE", "out")


@pytest.mark.slow
@pytest.mark.parametrize("format", ["peft", "merged", pytest.param("mlx", marks=pytest.mark.runtimes)])
def test_the_command_that_is_shown_loads_the_export(
    format: str, tiny_base: BaseModel, tiny_adapter: Adapter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "lit_phi2")
    export_to(tmp_path / "an export", tiny_adapter, tiny_base, format)
    command = caplog.messages[-1].splitlines()[-1].strip()
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout) > 20
