"""The subcommand export: an adapter that fit trained, in each format, checked on prompts of val_files."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from export.support import random_adapter, write_random_phi
from lit_phi2.adapters.adapter import Adapter
from lit_phi2.adapters.checkpoint import read_adapter
from lit_phi2.adapters.peft_format import save_adapter
from lit_phi2.cli.main import main
from lit_phi2.export.gguf import write_gguf_adapter
from lit_phi2.export.mlx import write_mlx_adapter
from lit_phi2.model.lora import LoraSettings
from lit_phi2.pretrained import resolve_base_model

Fit = Callable[..., int]
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


def export(*arguments: str, output_dir: str = "out") -> int:
    config = ["--config", str(RUN / "config.yaml"), "--ckpt_path", "last"]
    return main(["export", *config, "--output_dir", output_dir, *arguments])


def train(fit: Fit) -> None:
    """Two steps, as large as they must be to change completions."""
    assert fit("--trainer.max_steps", "2", "--model.learning_rate", "0.05", "--model.warmup_ratio", "0") == 0


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The error of a command that ends with exit code 2."""
    capsys.readouterr()
    assert main(arguments) == 2
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr
    return stderr.partition("error: ")[2]


def report(folder: str = "out") -> dict[str, Any]:
    return json.loads(Path(folder, "export.json").read_text())


@pytest.mark.parametrize(("format", "dtype", "files"), FORMATS)
def test_a_trained_adapter_is_exported_and_checked(
    format: str, dtype: str | None, files: str, fit: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    """In its runtime, on prompts that the run did not train on; the last line loads the result."""
    train(fit)
    capsys.readouterr()
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


def test_the_card_has_the_metrics_of_the_run(fit: Fit) -> None:
    train(fit)
    assert main(["test", "--config", "small.yaml", "--ckpt_path", "last", "--data.test_files", "records.jsonl"]) == 0
    loss = json.loads((RUN / "test_metrics.json").read_text())["test/loss"]
    assert export("--check", "0") == 0
    assert f"| test/loss | {loss:.6g} |" in Path("out", "README.md").read_text()


def test_check_0_exports_unchecked_and_says_so(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    train(fit)
    capsys.readouterr()
    assert export("--check", "0", "--data.val_files", "gone.jsonl") == 0
    assert "not checked: --check 0" in capsys.readouterr().err
    assert report()["check"]["method"] == "none"


def test_more_prompts_than_records_are_all_of_them(fit: Fit) -> None:
    train(fit)
    assert export("--check", "1000") == 0
    assert report()["check"]["num_prompts"] == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "onnx"], "--format onnx: is unknown; expected one of peft, merged"),
        (["--dtype", "q8_0"], "--dtype q8_0: --format peft has float32"),
        (["--check", "-1"], "--check -1: is less than 0"),
    ],
)
def test_settings_that_no_export_has_are_refused(
    arguments: list[str], message: str, fit: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    train(fit)
    assert export(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_base_with_another_tokenizer_is_no_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The packaged base is refused before a model is loaded, with the reason."""
    save_adapter(random_adapter(resolve_base_model("tiny"), LoraSettings(2, 4, ("fc1",))), tmp_path / "adapter")
    for format in ("gguf", "gguf-merged"):
        error = refused(
            ["export", f"--ckpt_path={tmp_path}/adapter", f"--output_dir={tmp_path}/out", f"--format={format}"], capsys
        )
        assert "--format gguf and gguf-merged: this base cannot run in llama.cpp: its tokenizer splits" in error
    assert not (tmp_path / "out").exists()


def test_a_file_beside_an_export_is_not_replaced(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    """The Modelfile of a GGUF adapter asks for base.gguf beside it; an export over it is an export over 5 GB."""
    train(fit)
    assert export("--check", "0") == 0
    assert export("--check", "0") == 0
    Path("out", "base.gguf").write_text("5 GB")
    assert export("--check", "0") == 2
    assert "holds files that no export wrote, such as base.gguf" in capsys.readouterr().err
    assert Path("out", "base.gguf").read_text() == "5 GB"


# Exports as checkpoints


@pytest.mark.parametrize(
    ("format", "exported"),
    [
        pytest.param("gguf", "out", marks=RUNTIMES),
        pytest.param("gguf", "out/adapter.gguf", marks=RUNTIMES),
        ("mlx", "out"),
    ],
)
def test_an_export_is_a_checkpoint(format: str, exported: str, fit: Fit) -> None:
    """predict with it writes the completions of the run's own adapter, and a new run starts from it."""
    train(fit)
    assert export("--format", format, "--check", "0") == 0
    predict = ["predict", "--config", "small.yaml", "--data.predict_files", "records.jsonl"]
    assert main([*predict, "--ckpt_path", str(RUN / "checkpoints/last.ckpt"), "--output", "a.jsonl"]) == 0
    assert main([*predict, "--ckpt_path", exported, "--output", "b.jsonl"]) == 0
    assert Path("a.jsonl").read_bytes() == Path("b.jsonl").read_bytes()
    assert fit("--model.adapter", exported, "--trainer.max_steps", "1", "--run_name", "second") == 0


@pytest.mark.parametrize("format", [pytest.param("gguf", marks=RUNTIMES), "mlx"])
def test_an_imported_adapter_exports_as_itself(format: str, fit: Fit) -> None:
    train(fit)
    assert export("--format", format, "--check", "0") == 0
    assert export("--check", "0", "--ckpt_path", "out", output_dir="again") == 2  # given twice
    again = ["export", "--config", "small.yaml", "--ckpt_path", "out", "--output_dir", "again", "--check", "1"]
    assert main(again) == 0
    first, second = read_adapter(RUN / "checkpoints/last.ckpt"), read_adapter(Path("again"))
    assert (first.settings, first.base) == (second.settings, second.base)
    assert all(torch.equal(weight, second.weights[name]) for name, weight in first.weights.items())


@RUNTIMES
def test_fit_does_not_continue_from_a_gguf(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    train(fit)
    assert export("--format", "gguf", "--check", "0") == 0
    capsys.readouterr()
    assert fit("--ckpt_path", "out") == 2
    assert "an adapter holds no optimizer state" in capsys.readouterr().err


HOSTILE = {
    "empty": b"",
    "another kind": b"PK\x03\x04" + bytes(64),
    "2^60 keys": b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60),
    "2^60 tensors": b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0),
    "a key of 2^62 bytes": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_gguf_is_refused(
    content: bytes, phi_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the adapter of a new run, and as the adapter of every subcommand."""
    file = tmp_path / "a.gguf"
    file.write_bytes(content)
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


EXPORTS = [pytest.param("gguf", marks=RUNTIMES), "mlx", "peft"]


@pytest.mark.parametrize("format", EXPORTS)
def test_an_adapter_for_another_width_is_refused(
    format: str, phi_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its base has no known fingerprint, so that only the shapes tell."""
    adapter = random_adapter(resolve_base_model("tiny"), LoraSettings(2, 4, ("fc1",)))
    adapter.base["base_digest"] = ""
    folder = write_export(adapter, format, 6, tmp_path / "adapter")
    error = refused(
        ["fit", f"--model.base={phi_dir}", f"--model.adapter={folder}", "--model.target_modules=[fc1]"], capsys
    )
    assert str(folder) in error
    out = f"--output_dir={tmp_path / 'out'}"
    assert str(folder) in refused(["export", f"--model.base={phi_dir}", f"--ckpt_path={folder}", out], capsys)


@pytest.mark.parametrize("format", EXPORTS)
def test_an_adapter_of_another_base_is_refused(
    format: str, phi_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same shapes, and another value in config.json."""
    other = tmp_path / "other"
    shutil.copytree(phi_dir, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 2e-5}))
    adapter = random_adapter(resolve_base_model(str(other)), LoraSettings(2, 4, ("fc1",)))
    folder = write_export(adapter, format, 2, tmp_path / "adapter")
    digests = [resolve_base_model(str(base)).digest for base in (other, phi_dir)]
    for command in (["export", f"--output_dir={tmp_path / 'out'}"], ["validate"]):
        error = refused([*command, f"--model.base={phi_dir}", f"--ckpt_path={folder}"], capsys)
        assert all(digest in error for digest in digests)
