"""provenance.json: what it says of a run and an export, and that a changed byte is refused and named."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from audit.conftest import RUN
from lit_phi2.audit.provenance import public_config
from lit_phi2.cli.main import main

CONFIG = str(RUN / "config.yaml")


def change_byte(file: Path, old: bytes = b"", new: bytes = b"") -> None:
    """Replace one byte: the first of `old` by `new`, or the last of the file by another one."""
    content = file.read_bytes()
    assert len(old) == len(new)
    changed = content.replace(old, new, 1) if old else content[:-1] + bytes([content[-1] ^ 1])
    assert sum(a != b for a, b in zip(content, changed, strict=True)) == 1
    file.write_bytes(changed)


def change_base_config(patch: object = None) -> None:
    change_byte(Path("base/config.json"), b"10000.0", b"20000.0")


def change_tokenizer(patch: object = None) -> None:
    change_byte(Path("base/tokenizer.json"), b"\n", b" ")


def change_weights(patch: object = None) -> None:
    change_byte(Path("base/model.safetensors"))


def change_checkpoints(patch: object = None) -> None:
    for kind in ("best", "last"):
        change_byte(RUN / "checkpoints" / f"{kind}.ckpt", b"float", b"floax")


def change_config(patch: object = None) -> None:
    change_byte(RUN / "config.yaml", b"weight_decay: 0.01", b"weight_decay: 0.02")


def change_data(patch: object = None) -> None:
    change_byte(Path("claims.jsonl"), b"claim", b"clain")


def change_template(patch: pytest.MonkeyPatch) -> None:
    """In the code, without a new version."""
    patch.setattr("lit_phi2.adapters.adapter.TEMPLATE_DIGEST", "0" * 16)


COMMANDS = {
    "predict": ["--data.predict_files", "claims.jsonl"],
    "validate": [],
    "test": ["--data.test_files", "claims.jsonl"],
    "export": ["--output_dir", "out", "--check", "0"],
    "audit": ["--what", "leakage"],
    "fit": [],
}


@pytest.mark.parametrize(
    ("change", "named", "by_fit"),
    [
        (change_base_config, "differ in config", "differ in config"),
        (change_tokenizer, "differ in tokenizer", "differ in tokenizer"),
        (change_weights, "differ in weights", "differ in weights"),
        (change_template, "prompt template", "prompt template"),
        (change_checkpoints, "best.ckpt", "last.ckpt"),
        (change_config, "config.yaml changed since provenance.json", "model.weight_decay: 0.01 in the checkpoint"),
        (change_data, None, "data.train_files"),
    ],
)
def test_every_command_refuses_a_changed_byte_and_names_it(
    small_setup: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[pytest.MonkeyPatch], None],
    named: str | None,
    by_fit: str,
) -> None:
    """The table of the audits' README. Records are no part of what predict and the others use of a run."""
    change(monkeypatch)
    files = {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()}
    for command, flags in COMMANDS.items():
        if expected := by_fit if command == "fit" else named:
            assert main([command, "--config", CONFIG, "--ckpt_path", str(RUN), *flags]) == 2, command
            assert expected in capsys.readouterr().err, command
    assert not Path("out").exists()
    assert all(path.read_bytes() == content for path, content in files.items())


def test_a_changed_exported_adapter_is_refused(small_setup: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That of a run, and one that was copied elsewhere."""
    shutil.copytree(RUN / "adapter", "copy")
    for folder in (RUN / "adapter", Path("copy")):
        change_byte(folder / "adapter_model.safetensors")
        for command in ("predict", "validate", "test", "export"):
            arguments = [command, "--config", CONFIG, "--ckpt_path", str(folder), *COMMANDS[command]]
            assert main(arguments) == 2, command
            assert str(folder) in capsys.readouterr().err, command


def test_verify_accepts_what_nobody_changed(small_setup: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--ckpt_path", str(RUN)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    assert all(line.startswith("ok ") for line in lines)


def test_verify_names_every_file_that_changed(small_setup: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = [change_base_config, change_tokenizer, change_weights, change_checkpoints, change_config]
    for change in changes:
        change()
    change_byte(RUN / "adapter" / "adapter_model.safetensors")
    change_byte(RUN / "ledger.parquet")
    (RUN / "adapter" / "lit_phi2.json").unlink()
    assert main(["verify", "--ckpt_path", str(RUN)]) == 3
    output = capsys.readouterr()
    faults = {line[:12].strip() + " " + line[13:].partition(":")[0] for line in output.out.splitlines()}
    files = ["checkpoints/best.ckpt", "checkpoints/last.ckpt", "config.yaml", "ledger.parquet"]
    parts = ["base config", "base tokenizer", "base weights", "adapter/adapter_model.safetensors"]
    assert {f"changed {name}" for name in files + parts} | {"missing adapter/lit_phi2.json"} <= faults
    assert all(name in output.err for name in [*files, *parts, "adapter/lit_phi2.json"])


def test_verify_notices_an_edited_provenance(small_setup: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_byte(RUN / "provenance.json", b'"total_steps": ', b'"total_stepz": ')
    assert main(["verify", "--ckpt_path", str(RUN)]) == 3
    assert "changed      provenance.json" in capsys.readouterr().out


def test_verify_names_another_template(
    small_setup: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_phi2.audit.verify.TEMPLATE_DIGEST", "0" * 16)
    assert main(["verify", "--ckpt_path", str(RUN)]) == 3
    assert "changed      template" in capsys.readouterr().out


def test_verify_tells_that_other_code_trained_it(
    small_setup: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is no fault: every file is as it was."""
    monkeypatch.setattr("lit_phi2.audit.verify.code_digest", lambda: "0" * 64)
    assert main(["verify", "--ckpt_path", str(RUN)]) == 0
    assert "differs      code of lit_phi2: another version trained it" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["../claims.jsonl", "adapter/../../x", "/etc/hostname"])
def test_a_provenance_about_files_elsewhere_is_refused(
    name: str, small_setup: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run from somebody else: it would tell which files this machine has."""
    statement = json.loads((RUN / "provenance.json").read_text())
    statement["subject"][0]["name"] = name
    (RUN / "provenance.json").write_text(json.dumps(statement))
    assert main(["verify", "--ckpt_path", str(RUN)]) == 2
    assert "provenance.json: is no provenance of lit_phi2, or was changed" in capsys.readouterr().err


def test_a_changed_record_is_named_by_its_place(small_setup: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = Path("claims.jsonl").read_bytes().splitlines(keepends=True)
    lines[8] = lines[8].replace(b"claim", b"clain", 1)
    Path("claims.jsonl").write_bytes(b"".join(lines))
    assert main(["verify", "--ckpt_path", str(RUN)]) == 3
    assert "claims.jsonl:9 of the ledger is another record now" in capsys.readouterr().out


@pytest.mark.parametrize("folder", [RUN, RUN / "adapter"])
def test_it_is_an_in_toto_statement_about_every_file(small_setup: Path, folder: Path) -> None:
    """The references are the layout of in-toto Statement v1 and sha256 of the files as they are."""
    statement = json.loads((folder / "provenance.json").read_text())
    assert list(statement) == ["_type", "subject", "predicateType", "predicate"]
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert ":" in statement["predicateType"]  # a URI
    for subject in statement["subject"]:
        content = (folder / subject["name"]).read_bytes()
        assert subject["digest"] == {"sha256": hashlib.sha256(content).hexdigest()}
    names = {subject["name"] for subject in statement["subject"]}
    assert {"adapter_model.safetensors", "adapter_config.json", "lit_phi2.json"} <= {Path(n).name for n in names}


def test_it_says_what_the_run_was_made_from(small_setup: Path) -> None:
    predicate = json.loads((RUN / "provenance.json").read_text())["predicate"]
    settings = predicate["buildDefinition"]["internalParameters"]["settings"]
    assert (settings["seed_everything"], settings["compute_dtype"]) == (42, "float32")
    environment = predicate["buildDefinition"]["internalParameters"]["environment"]
    assert {"torch", "device", "num_threads"} == set(environment)
    assert predicate["runDetails"]["builder"]["version"]["torch"] == environment["torch"]
    names = [each["name"] for each in predicate["buildDefinition"]["resolvedDependencies"]]
    parts = ["base", "base config", "base tokenizer", "base weights", "template"]
    assert names == [*parts, "data.train_files", "data.val_files", "config.yaml"]
    (ledger,) = predicate["runDetails"]["byproducts"]
    assert ledger["digest"]["sha256"] == hashlib.sha256((RUN / "ledger.parquet").read_bytes()).hexdigest()
    assert 0 < predicate["training"]["steps"] <= predicate["training"]["total_steps"]
    assert predicate["metrics"]["best val/loss"] > 0


def test_it_holds_no_path(small_setup: Path, trained: Path) -> None:
    assert main(["export", "--config", CONFIG, "--ckpt_path", str(RUN), "--output_dir", "out", "--check", "0"]) == 0
    for file in (RUN / "provenance.json", RUN / "adapter" / "provenance.json", Path("out/provenance.json")):
        assert "members" not in file.read_text()
        assert "runs/" not in file.read_text()


def test_folders_of_other_systems_are_cut_from_a_config_too() -> None:
    config = {"data": {"train_files": ["C:\\ann\\a.jsonl", "/home/ann/b.jsonl"], "cache": "/home/ann/cache/"}}
    assert public_config(config, "") == {"data": {"train_files": ["a.jsonl", "b.jsonl"], "cache": "cache"}}


@pytest.mark.parametrize(("format", "name"), [("peft", "adapter_model"), ("merged", "model"), ("mlx", "adapters")])
def test_exports_carry_it_in_their_tensors_metadata(small_setup: Path, format: str, name: str) -> None:
    """The reference reads the metadata with the package safetensors."""
    audit = {"passed": False, "max_auc": 0.6}
    (RUN / "audit_leakage.json").write_text(json.dumps(audit))
    flags = ["--ckpt_path", str(RUN), "--output_dir", "out", "--check", "0", "--format", format]
    assert main(["export", "--config", CONFIG, *flags]) == 0
    predicate = json.loads(Path("out/provenance.json").read_text())["predicate"]
    with safe_open(f"out/{name}.safetensors", "pt") as tensors:
        embedded = json.loads(tensors.metadata()["lit_phi2.provenance"])
    expected = hashlib.sha256(json.dumps(predicate, sort_keys=True).encode()).hexdigest()
    assert embedded["predicate_sha256"] == expected
    assert (predicate["export"]["format"], predicate["audits"]) == (format, {"audit_leakage": audit})
    assert embedded["digests"]["ledger.parquet"] == hashlib.sha256((RUN / "ledger.parquet").read_bytes()).hexdigest()
    assert main(["verify", "--ckpt_path", "out", "--model.base", "base"]) == 0


def test_verify_names_a_file_that_was_added(small_setup: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--config", CONFIG, "--ckpt_path", str(RUN), "--output_dir", "out", "--check", "0"]) == 0
    Path("out/pytorch_model.bin").write_bytes(b"weights of somebody else")
    assert main(["verify", "--ckpt_path", "out", "--model.base", "base"]) == 3
    assert "added        pytorch_model.bin" in capsys.readouterr().out


def test_a_run_that_was_killed_has_none_and_says_so(small_setup: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (RUN / "provenance.json").unlink()
    assert main(["verify", "--ckpt_path", str(RUN / "checkpoints" / "last.ckpt")]) == 2
    assert "its run has not ended" in capsys.readouterr().err
