"""Each export in its own runtime, against the running model: completions, distributions, tokens, templates.

The reference is lit_phi2's own forward pass, and the answer is the runtime's, which shares no code with it. Bounds are
ten times what was measured.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from export.support import claims_prompts, reference_of
from lit_phi2.adapters.adapter import Adapter
from lit_phi2.data.encode import tokenize
from lit_phi2.export.card import CardFacts
from lit_phi2.export.checks import Check
from lit_phi2.export.exporter import export, plan_export
from lit_phi2.export.gguf import write_gguf_model
from lit_phi2.export.llama_cpp import LlamaCppError, LlamaCppProcess
from lit_phi2.export.parity import Parity, Reference
from lit_phi2.export.weights import ModelWeights
from lit_phi2.pretrained import BaseModel

NUM_PROMPTS, NUM_TOKENS = 32, 8  # scripts/export_parity.py compares 32 tokens of each, with Phi-2's own tokenizer
# Largest difference of the logarithms of two probabilities. llama.cpp keeps keys and values in float16.
FLOAT32 = [
    pytest.param("peft", None, 1e-4, id="peft"),
    pytest.param("merged", "float32", 1e-4, id="merged"),
    pytest.param("gguf", None, 5e-2, id="gguf", marks=pytest.mark.runtimes),
    pytest.param("gguf-merged", "float32", 5e-2, id="gguf-merged", marks=pytest.mark.runtimes),
    pytest.param("mlx", None, 1e-4, id="mlx", marks=pytest.mark.runtimes),
]
ROUNDED = [
    pytest.param("merged", "bfloat16", 3e-3, id="merged-bfloat16"),
    pytest.param("merged", "float16", 3e-5, id="merged-float16"),
    pytest.param("gguf-merged", "bfloat16", 3e-3, id="gguf-bfloat16", marks=pytest.mark.runtimes),
    pytest.param("gguf-merged", "float16", 3e-5, id="gguf-float16", marks=pytest.mark.runtimes),
    pytest.param("gguf-merged", "q8_0", 1e-2, id="gguf-q8_0", marks=pytest.mark.runtimes),
]


@pytest.fixture(scope="session")
def reference(export_base: BaseModel, adapter: Adapter) -> Reference:
    return reference_of(export_base, adapter, NUM_PROMPTS, NUM_TOKENS)


@pytest.fixture(scope="session")
def few(reference: Reference) -> Reference:
    """A quarter of its prompts: where tokens differ, llama.cpp starts again at each."""
    parts = {name: getattr(reference, name)[::4] for name in ("prompts", "completions", "logprobs")}
    return replace(reference, **parts)


@pytest.fixture(scope="session")
def base_gguf(
    export_base: BaseModel, export_tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "base.gguf"
    write_gguf_model(ModelWeights(export_base, None), export_tokenizer, path, "float16")
    return path


def exported(
    adapter: Adapter, base: BaseModel, folder: Path, format: str, dtype: str | None, reference: Reference
) -> tuple[Check, Parity]:
    plan = plan_export(adapter, base, folder, format=format, dtype=dtype, source="adapter")
    check = export(plan, reference, CardFacts())
    assert check.parity is not None
    print(f"\n{format} {plan.dtype}: {check.parity.max_difference:.1e} {check.summary}")  # the table, with pytest -s
    return check, check.parity


@pytest.mark.parametrize(("format", "dtype", "bound"), FLOAT32)
def test_every_runtime_completes_as_the_running_model(
    format: str,
    dtype: str,
    bound: float,
    export_base: BaseModel,
    adapter: Adapter,
    reference: Reference,
    tmp_path: Path,
) -> None:
    """Tokens may differ only where the model finds its two best within the bound; the adapter moves them by 1 nat."""
    _, parity = exported(adapter, export_base, tmp_path / "out", format, dtype, reference)
    assert reference.adapter_effect > 1
    assert parity.num_prompts == NUM_PROMPTS
    assert parity.max_difference < bound
    assert parity.widest_gap < bound
    assert parity.equal_tokens >= parity.num_tokens - 1


@pytest.mark.parametrize(("format", "dtype", "bound"), ROUNDED)
def test_rounded_models_stay_close(
    format: str,
    dtype: str,
    bound: float,
    export_base: BaseModel,
    adapter: Adapter,
    few: Reference,
    tmp_path: Path,
) -> None:
    _, parity = exported(adapter, export_base, tmp_path / "out", format, dtype, few)
    assert parity.max_kl < bound
    assert parity.equal_tokens > 0.9 * parity.num_tokens


@pytest.mark.runtimes
def test_mlx_rotates_the_tiny_base_as_transformers_does(
    tiny_base: BaseModel, tiny_adapter: Adapter, tmp_path: Path
) -> None:
    """Its config.json has nested rope settings only, with half of a head rotated; mlx-lm would rotate 0.4 of it.

    mlx-lm computes in bfloat16, as the base is saved: a KL of 0.06 at most. With 0.4 rotated it is above 10.
    """
    reference = reference_of(tiny_base, tiny_adapter, 2, max_tokens=8)
    _, parity = exported(tiny_adapter, tiny_base, tmp_path / "out", "mlx", None, reference)
    assert parity.max_kl < 0.2


@pytest.mark.runtimes
def test_llama_cpp_reads_the_tokens_of_every_record(base_gguf: Path, export_tokenizer: PreTrainedTokenizerBase) -> None:
    """Reference: the base's own tokenizer, also for runs of spaces, other scripts, and the text of a special token."""
    texts = [
        *claims_prompts("test"),
        "a  b   c\t\td\n\n\n e",
        "naïve Größe 東京 🙂",
        "<|endoftext|> is text",
        "it's we'll 12345 $1,200.00",
    ]
    assert len(texts) == 436 + 4
    with LlamaCppProcess(base_gguf, None, context=64, num_threads=1) as process:
        for text, expected in zip(texts, tokenize(export_tokenizer, texts), strict=True):
            assert process.tokenize(text) == expected, text


@pytest.mark.runtimes
def test_llama_cpp_renders_a_chat_as_the_prompt(base_gguf: Path, tmp_path: Path) -> None:
    """In a process of its own, since llama.cpp's server is what renders."""
    code = (
        "import json, sys, urllib.request, xllamacpp\n"
        "params = xllamacpp.CommonParams(); params.model.path = sys.argv[1]; params.n_ctx = 64\n"
        "server = xllamacpp.Server(params)\n"
        "request = urllib.request.Request(server.listening_address + '/apply-template', sys.argv[2].encode(),\n"
        "                                 {'Content-Type': 'application/json'})\n"
        "open(sys.argv[3], 'w').write(urllib.request.urlopen(request).read().decode())\n"
    )
    messages = json.dumps({"messages": [{"role": "user", "content": "Why?\n\n### Input:\nCode 97"}]})
    answer = tmp_path / "answer.json"
    subprocess.run([sys.executable, "-c", code, base_gguf, messages, answer], check=True, timeout=120)
    expected = "### Instruction:\nWhy?\n\n### Input:\nCode 97\n\n### Response:\n"
    assert json.loads(answer.read_text())["prompt"] == expected


@pytest.mark.runtimes
def test_a_file_that_llama_cpp_refuses_is_an_error(tmp_path: Path) -> None:
    """llama.cpp ends its process; ours goes on."""
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    with (
        LlamaCppProcess(tmp_path / "x.gguf", None, context=64, num_threads=1) as process,
        pytest.raises(LlamaCppError, match=r"llama\.cpp"),
    ):
        process.greedy([1, 2], 2)


@pytest.mark.parametrize("format", ["gguf", "gguf-merged", "mlx"])
@pytest.mark.runtimes
def test_without_its_runtime_an_export_is_read_back(
    format: str, export_base: BaseModel, adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_phi2.export.checks.is_installed", lambda package: False)
    reference = reference_of(export_base, adapter, 1, max_tokens=1)
    plan = plan_export(adapter, export_base, tmp_path / "out", format=format, dtype=None, source="adapter")
    check = export(plan, reference, CardFacts())
    assert check.method == "read back"
    assert "is not installed here" in check.summary
