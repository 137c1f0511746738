"""An export with little memory or disk: prompts share forwards, their number is bounded, a full disk leaves nothing."""

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from export.support import claims_prompts, reference_of, running_model
from lit_phi2.adapters.adapter import Adapter
from lit_phi2.adapters.peft_format import save_adapter
from lit_phi2.cli.main import main
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.data.encode import tokenize
from lit_phi2.errors import InputError
from lit_phi2.export.card import CardFacts
from lit_phi2.export.exporter import export, plan_export
from lit_phi2.export.parity import MAX_PROMPTS, run_reference
from lit_phi2.pretrained import BaseModel
from lit_phi2.training.exporting import held_out_prompts

MERGED = (
    "--format=merged",
    "--check=0",
    "--data.train_files=claims:train[:4]",
    "--data.val_files=claims:validation[:4]",
)


def test_prompts_that_share_forwards_are_answered_as_alone(
    export_base: BaseModel, export_tokenizer: PreTrainedTokenizerBase, adapter: Adapter
) -> None:
    """Of different lengths, so that padding would show; and more tokens together than one batch takes."""
    texts = tokenize(export_tokenizer, claims_prompts("test")[:11])
    prompts = [[*ids, *ids, *ids][: 40 + 30 * number] for number, ids in enumerate(texts)]
    phi, eos = running_model(export_base, adapter), export_tokenizer.eos_token_id
    together = run_reference(phi, prompts, eos_token_id=eos, max_tokens=4)
    alone = [run_reference(phi, [prompt], eos_token_id=eos, max_tokens=4) for prompt in prompts]
    assert together.completions == [each.completions[0] for each in alone]
    for logprobs, each in zip(together.logprobs, alone, strict=True):
        assert torch.allclose(logprobs, each.logprobs[0], atol=1e-4)
    assert together.adapter_effect == pytest.approx(max(each.adapter_effect for each in alone), rel=1e-3)


def test_a_check_has_a_largest_number_of_prompts() -> None:
    """The packaged validation records are more."""
    data = ClaimsDataModule(base="tiny", train_files="claims:train[:4]", val_files="claims:validation[:70]")
    assert len(held_out_prompts(data, MAX_PROMPTS, 2048)) == MAX_PROMPTS == 64
    with pytest.raises(InputError, match="--check 70: at most 64 prompts are compared"):
        held_out_prompts(data, 1000, 2048)


@pytest.mark.runtimes
def test_the_base_of_a_gguf_check_lies_inside_the_export(
    export_base: BaseModel, adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 GB at true size: there a killed export leaves them to the next one, which removes that folder."""
    seen: list[str] = []

    def stop(model: Path, *_: object) -> None:
        seen.extend(str(path.relative_to(tmp_path)).partition("/")[0] for path in (model, model.parent))
        assert model.stat().st_size > 10**6
        raise KeyboardInterrupt

    monkeypatch.setattr("lit_phi2.export.checks.llama_cpp_runtime", stop)
    plan = plan_export(adapter, export_base, tmp_path / "out", format="gguf", dtype=None, source="adapter")
    with pytest.raises(KeyboardInterrupt):
        export(plan, reference_of(export_base, adapter, 1, max_tokens=1), CardFacts())
    assert seen == [".out.export", ".out.export"]
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may exceed 100 KB: the error of a full disk, by another number."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_told_in_the_words_of_an_export(
    tiny_adapter: Adapter, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1; not the words of fit, which has a checkpoint to continue from."""
    save_adapter(tiny_adapter, tmp_path / "adapter")
    request.getfixturevalue("small_files")
    out = tmp_path / "out"
    assert main(["export", f"--ckpt_path={tmp_path}/adapter", f"--output_dir={out}", *MERGED]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {out}: File too large. Nothing was exported."
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
