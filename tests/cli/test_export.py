"""The subcommand export: an adapter that fit trained, in each format, checked on prompts of val_files."""

import json
import shlex
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from export.support import random_adapter, write_random_phi
from lit_phi2.adapters.adapter import Adapter
from lit_phi2.adapters.checkpoint import read_adapter
from lit_phi2.adapters.peft_format import save_adapter
from lit_phi2.cli.main import main
from lit_phi2.export.gguf import write_gguf_adapter
from lit_phi2.export.llama_cpp import LlamaCppProcess
from lit_phi2.export.mlx import write_mlx_adapter
from lit_phi2.model.lora import LoraSettings
from lit_phi2.pretrained import resolve_base_model

RUN = Path("runs/small/version_0")
RUNTIMES = pytest.mark.runtimes
# Format, dtype, and what it has beside README.md and export.json.
FORMATS = [
    pytest.param("peft", None, "adapter_config.json adapter_model.safetensors lit_phi2.json", id="peft"),
    pytest.param("merged", "float32", "config.json generation_config.json model.safetensors", id="merged"),
    pytest.param("gguf", None, "Modelfile adapter.gguf", id="gguf", marks=RUNTIMES),
    pytest.param("gguf-merged", "f32", "Modelfile model-f32.gguf", id="gguf-merged", marks=RUNTIMES),
    pytest.param("gguf-merged", "q8_0", "Modelfile model-q8_0.gguf", id="q8_0", marks=RUNTIMES),
    pytest.param("mlx", None, "adapter_config.json adapters.safetensors", id="mlx", marks=RUNTIMES),
]


@pytest.fixture(scope="session")
def phi_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that every runtime can run; `fit` trains on it."""
    folder = tmp_path_factory.mktemp("gpt2-layout")
    write_random_phi(folder)
    return folder


@pytest.fixture(scope="module")
def trained(phi_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small.yaml, its records, and its run: two steps, large enough to change completions."""
    folder = tmp_path_factory.mktemp("trained") / "work"
    folder.mkdir()
    words = [
        "claim",
        "denied",
        "appeal",
        "letter",
        "plan",
        "review",
        "records",
        "date",
        "service",
        "coverage",
        "notice",
        "send",
    ]
    rows = [
        {"id": f"r{number}", "instruction": " ".join(words[: 3 + number % 5]), "response": f"{words[number]}."}
        for number in range(12)
    ]
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": {"base": str(phi_dir), "max_new_tokens": 4, "dtype": "float32"},
        "data": {"train_files": "records.jsonl", "val_files": "records.jsonl", "packing": False, "max_length": 128},
        "trainer": {"max_epochs": 2, "accelerator": "cpu"},
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        large = ["--trainer.max_steps", "2", "--model.learning_rate", "0.05", "--model.warmup_ratio", "0"]
        assert main(["fit", "--config", "small.yaml", *large]) == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory has a copy of that folder."""
    shutil.copytree(trained, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")


def export(*arguments: str, output_dir: str = "out") -> int:
    config = ["--config", str(RUN / "config.yaml"), "--ckpt_path", "last"]
    return main(["export", *config, "--output_dir", output_dir, *arguments])


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The error of a command that ends with exit code 2."""
    capsys.readouterr()
    assert main(arguments) == 2
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr
    return stderr.partition("error: ")[2]


def report(folder: str = "out") -> dict[str, Any]:
    return json.loads(Path(folder, "export.json").read_text())


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize(("format", "dtype", "files"), FORMATS)
def test_a_trained_adapter_is_exported_and_checked(
    format: str, dtype: str | None, files: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In its runtime, on prompts of val_files; the last line loads the result."""
    assert export("--format", format, "--check", "2", *(["--dtype", dtype] if dtype else [])) == 0
    written = {path.name for path in Path("out").iterdir()}
    assert {"README.md", "export.json", *files.split()} <= written
    check = report()["check"]
    assert (check["method"], check["num_prompts"]) == ("runtime", 2)
    assert check["adapter_effect"] > 100 * check["max_kl"]
    logged = capsys.readouterr().err.rstrip().splitlines()
    assert logged[-2] == "to load it:"
    assert "out" in logged[-1]
    card = Path("out", "README.md").read_text()
    assert "| train | 12 |" in card
    assert "| val | 12 |" in card


@pytest.mark.usefixtures("run")
def test_the_card_has_the_metrics_of_the_run() -> None:
    """Those in the run's test_metrics.json, which `test` writes."""
    (RUN / "test_metrics.json").write_text(json.dumps({"test/loss": 1.25, "completions": {}}))
    assert export("--check", "0") == 0
    assert "| test/loss | 1.25 |" in Path("out", "README.md").read_text()


@pytest.mark.usefixtures("run")
def test_check_0_exports_unchecked_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert export("--check", "0", "--data.val_files", "gone.jsonl") == 0
    assert "not checked: --check 0" in capsys.readouterr().err
    assert report()["check"]["method"] == "none"


@pytest.mark.usefixtures("run")
def test_more_prompts_than_records_are_all_of_them() -> None:
    assert export("--check", "1000") == 0
    assert report()["check"]["num_prompts"] == 12


@pytest.mark.usefixtures("run")
def test_settings_that_no_export_has_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--dtype", "q8_0"], "--dtype q8_0: --format peft has float32"),
        (["--check", "-1"], "--check -1: is less than 0"),
    ):
        assert export(*arguments) == 2
        assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_base_with_another_tokenizer_is_no_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The packaged base is refused before a model is loaded, with the reason."""
    save_adapter(random_adapter(resolve_base_model("tiny"), LoraSettings(2, 4, ("fc1",))), tmp_path / "adapter")
    command = ["export", f"--ckpt_path={tmp_path}/adapter", f"--output_dir={tmp_path}/out", "--format=gguf"]
    error = refused(command, capsys)
    assert "--format gguf and gguf-merged: this base cannot run in llama.cpp: its tokenizer splits" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("run")
def test_a_file_beside_an_export_is_not_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    """The Modelfile of a GGUF adapter asks for base.gguf beside it; an export over it is an export over 5 GB."""
    assert export("--check", "0") == 0
    Path("out", "base.gguf").write_text("5 GB")
    assert export("--check", "0") == 2
    assert "holds files that no export wrote, such as base.gguf" in capsys.readouterr().err
    assert Path("out", "base.gguf").read_text() == "5 GB"


# The base alone


@pytest.mark.usefixtures("run")
def test_without_a_checkpoint_the_base_is_exported(phi_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its weights, bit for bit, and a check against the running base; an adapter's format is refused."""
    command = ["export", "--config", "small.yaml", "--output_dir", "out", "--check", "1"]
    assert "--format peft: exports an adapter. Give one with --ckpt_path." in refused(command, capsys)
    assert main([*command, "--format", "merged", "--dtype", "float32"]) == 0
    assert "no --ckpt_path: the base alone is exported, without an adapter" in capsys.readouterr().err
    assert (report()["check"]["equal_completions"], report()["check"]["adapter_effect"]) == (1, 0)
    weights, expected = (load_file(folder / "model.safetensors") for folder in (Path("out"), phi_dir))
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())
    assert "converted with lit_phi2" in Path("out", "README.md").read_text()


@RUNTIMES
@pytest.mark.usefixtures("run")
def test_the_base_that_a_gguf_adapter_needs_is_made_as_told(capsys: pytest.CaptureFixture[str]) -> None:
    """By the command in the log, from a folder with a space; llama.cpp then loads what the last line names."""
    assert export("--format", "gguf", "--check", "0", output_dir="an export") == 0
    hint, *_, load = (line.strip() for line in capsys.readouterr().err.splitlines() if line.startswith("    "))
    assert main([*shlex.split(hint)[3:], "--check", "0"]) == 0
    _, _, model, _, adapter = shlex.split(load)
    assert (model, adapter) == ("base-gguf/model-f16.gguf", "an export/adapter.gguf")
    with LlamaCppProcess(Path(model), Path(adapter), context=64, num_threads=1) as process:
        assert len(process.greedy([5, 6, 7], 2)["tokens"]) == 2


# Exports as checkpoints


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize(
    ("format", "exported"), [pytest.param("gguf", "out/adapter.gguf", marks=RUNTIMES), ("mlx", "out")]
)
def test_an_export_is_a_checkpoint(format: str, exported: str) -> None:
    """predict with it writes the completions of the run's own adapter, and a new run starts from it."""
    assert export("--format", format, "--check", "0") == 0
    predict = ["predict", "--config", "small.yaml", "--data.predict_files", "records.jsonl"]
    assert main([*predict, "--ckpt_path", str(RUN / "checkpoints/last.ckpt"), "--output", "a.jsonl"]) == 0
    assert main([*predict, "--ckpt_path", "out", "--output", "b.jsonl"]) == 0
    assert Path("a.jsonl").read_bytes() == Path("b.jsonl").read_bytes()
    again = ["--model.adapter", exported, "--trainer.max_steps", "1", "--run_name", "second"]
    assert main(["fit", "--config", "small.yaml", *again]) == 0


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("format", [pytest.param("gguf", marks=RUNTIMES), "mlx", "peft"])
def test_an_imported_adapter_exports_as_itself(format: str) -> None:
    """Bit for bit, since alpha / r is 2; the base is named as an export names it, by its folder alone."""
    assert export("--format", format, "--check", "0") == 0
    again = ["export", "--config", "small.yaml", "--ckpt_path", "out", "--output_dir", "again", "--check", "0"]
    assert main(again) == 0
    first, second = read_adapter(RUN / "checkpoints/last.ckpt"), read_adapter(Path("again"))
    assert first.settings == second.settings
    assert first.base | {"base": Path(first.base["base"]).name} == second.base
    assert all(torch.equal(weight, second.weights[name]) for name, weight in first.weights.items())


@RUNTIMES
@pytest.mark.usefixtures("run")
def test_fit_does_not_continue_from_a_gguf(capsys: pytest.CaptureFixture[str]) -> None:
    assert export("--format", "gguf", "--check", "0") == 0
    assert "an adapter holds no optimizer state" in refused(
        ["fit", "--config", "small.yaml", "--ckpt_path", "out"], capsys
    )


def test_a_hostile_gguf_is_refused(phi_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the adapter of a new run, and of every subcommand; the reader's own tests have many such files."""
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0))
    assert str(file) in refused(["fit", f"--model.base={phi_dir}", f"--model.adapter={file}"], capsys)
    for command in ("validate", "test", "predict", "export"):
        more = [f"--output_dir={tmp_path / 'out'}"] if command == "export" else []
        assert str(file) in refused([command, f"--model.base={phi_dir}", f"--ckpt_path={file}", *more], capsys)


def write_export(adapter: Adapter, format: str, num_layers: int, folder: Path) -> Path:
    """A GGUF file, or a folder for mlx-lm or PEFT."""
    folder.mkdir()
    if format == "gguf":
        write_gguf_adapter(adapter, num_layers, folder / "adapter.gguf")
    elif format == "mlx":
        write_mlx_adapter(adapter, num_layers, folder)
    else:
        save_adapter(adapter, folder)
    return folder


# Format, and the subcommand that is given it.
EXPORTS = [pytest.param("gguf", "fit", marks=RUNTIMES), ("mlx", "export"), ("peft", "validate")]


def use(command: str, base: Path, adapter: Path, tmp_path: Path) -> list[str]:
    flag = "--model.adapter" if command == "fit" else "--ckpt_path"
    more = [f"--output_dir={tmp_path / 'out'}"] if command == "export" else []
    more += ["--model.target_modules=[fc1]"] if command == "fit" else []
    return [command, f"--model.base={base}", f"{flag}={adapter}", *more]


@pytest.mark.parametrize(("format", "command"), EXPORTS)
def test_an_adapter_for_another_width_is_refused(
    format: str, command: str, phi_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its base has no known fingerprint, so that only the shapes tell."""
    adapter = random_adapter(resolve_base_model("tiny"), LoraSettings(2, 4, ("fc1",)))
    adapter.base["base_digest"] = ""
    folder = write_export(adapter, format, 6, tmp_path / "adapter")
    assert str(folder) in refused(use(command, phi_dir, folder, tmp_path), capsys)


@pytest.mark.parametrize(("format", "command"), EXPORTS)
def test_an_adapter_of_another_base_is_refused(
    format: str, command: str, phi_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same shapes, and another value in config.json."""
    other = tmp_path / "other"
    shutil.copytree(phi_dir, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 2e-5}))
    adapter = random_adapter(resolve_base_model(str(other)), LoraSettings(2, 4, ("fc1",)))
    folder = write_export(adapter, format, 2, tmp_path / "adapter")
    digests = [resolve_base_model(str(base)).digest for base in (other, phi_dir)]
    error = refused(use(command, phi_dir, folder, tmp_path), capsys)
    assert all(digest in error for digest in digests)
