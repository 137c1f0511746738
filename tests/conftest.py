"""Shared fixtures: a two-layer random Phi with the packaged tokenizer, and a few records. No network, no GPU."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers import AutoTokenizer, PhiConfig, PhiForCausalLM, PreTrainedTokenizerBase

from lit_phi2.export.runtimes import is_installed
from lit_phi2.pretrained import TINY_PHI_DIR, BaseModel, resolve_base_model

settings.register_profile("tests", deadline=None, derandomize=True, database=None)  # the same examples on any machine
settings.load_profile("tests")

WORDS = ["claim", "denied", "appeal", "letter", "plan", "review", "records", "date", "service", "coverage"]
WORDS += ["notice", "send"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Report tests without their device or runtime as not run, and begin with the slow ones: workers end together."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    for item in items:
        for device, is_present in present.items():
            if device in item.keywords and not is_present:
                item.add_marker(pytest.mark.skip(reason=f"not run: no {device} device here"))
    missing = [package for package in ("gguf", "xllamacpp", "mlx_lm") if not is_installed(package)]
    for item in items:
        if missing and "runtimes" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=f"not run: {', '.join(missing)} not installed here"))
    items.sort(key=lambda item: "slow" not in item.keywords)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TINY_PHI_DIR)


@pytest.fixture(scope="session")
def phi_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A random two-layer Phi in Hugging Face form, float32, with the dropout that Phi-2's config has.

    Weights of standard deviation 0.1 instead of 0.02: attention is then far from uniform, so that a leak between
    examples or a wrong rotation shows in the logits.
    """
    folder = tmp_path_factory.mktemp("phi")
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        resid_pdrop=0.1,
        initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    PhiForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_PHI_DIR / name, folder)
    return folder


@pytest.fixture(scope="session")
def claims_phi_dir(phi_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without dropout, and with enough positions for the packaged claims."""
    folder = tmp_path_factory.mktemp("claims-phi") / "phi"
    shutil.copytree(phi_dir, folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"resid_pdrop": 0.0, "max_position_embeddings": 1024}))
    return folder


@pytest.fixture(scope="session")
def base(phi_dir: Path) -> BaseModel:
    return resolve_base_model(str(phi_dir))


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes objects, one per line; strings are written as they are, so that a line can be malformed on purpose."""

    def write(rows: list[object], name: str = "records.jsonl") -> Path:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path = tmp_path / name
        path.write_text("".join(line + "\n" for line in lines), "utf-8")
        return path

    return write


@pytest.fixture
def record_rows() -> list[dict[str, str]]:
    """Twelve records of different lengths, every other one with an input section."""
    return [
        {
            "id": f"r{number}",
            "instruction": " ".join(WORDS[: 3 + number % 5]),
            "input": " ".join(WORDS[number % 4 :]) if number % 2 else "",
            "response": " ".join(WORDS[number % 3 : 4 + number % 7]) + ".",
        }
        for number in range(12)
    ]
