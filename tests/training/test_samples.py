"""samples.jsonl: every sample of a run once, whatever its text, and no completion beyond the positions of the base."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.plugin_util import markdown_to_safe_html

from helpers import new_data, new_module, new_trainer
from lit_phi2.cli.main import main
from lit_phi2.training.callbacks.samples import to_markdown
from lit_phi2.training.module import LitPhi2
from lit_phi2.utils.files import read_json_lines

LINE_ENDS = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r"]  # of str.splitlines


def test_records_that_hold_line_separators_train_and_resume(
    phi_dir: Path, record_rows: list[dict[str, str]], write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    """The four samples hold all of them, in prompt and reference."""
    for number, row in enumerate(record_rows):
        row["input"] += f"page one{LINE_ENDS[number % 9]}page two{LINE_ENDS[(number + 4) % 9]}end"
        row["response"] += f" line one{LINE_ENDS[number % 9]}line two"
    file = write_jsonl(list(record_rows))
    arguments = [f"--data.{name}_files={file}" for name in ("train", "val")]
    arguments += [f"--model.base={phi_dir}", "--model.max_new_tokens=4", "--model.dtype=float32", "--run_name=small"]
    arguments += ["--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", "--trainer.num_sanity_val_steps=-1"]
    arguments += [f"--trainer.default_root_dir={tmp_path}", "--data.max_length=128", "--trainer.val_check_interval=0.5"]
    assert main(["fit", *arguments]) == 0
    samples = list(read_json_lines(tmp_path / "small" / "version_0" / "samples.jsonl"))
    assert [sample["reference"] for sample in samples[:4]] == [row["response"] for row in record_rows[:4]]
    assert main(["fit", *arguments, "--ckpt_path", "last"]) == 0
    assert list(read_json_lines(tmp_path / "small" / "version_0" / "samples.jsonl")) == samples


def test_samples_stay_inside_the_positions_of_the_base(
    phi_dir: Path,
    record_rows: list[dict[str, str]],
    write_jsonl: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """512 positions, a prompt of about 500 tokens, and completions of up to 30: the long prompt's is cut, no other."""
    record_rows[1]["input"] = "claim " * 480
    lengths: list[tuple[int, int]] = []
    generate = LitPhi2.generate

    def record_lengths(self: LitPhi2, prompts: list[list[int]], *args: Any) -> Any:
        completions = generate(self, prompts, *args)
        lengths.extend((len(prompt), len(each.ids)) for prompt, each in zip(prompts, completions, strict=True))
        return completions

    monkeypatch.setattr(LitPhi2, "generate", record_lengths)
    data = new_data(phi_dir, write_jsonl(list(record_rows)), max_length=512, max_new_tokens=30)
    trainer = new_trainer(tmp_path, num_sanity_val_steps=-1, limit_train_batches=1)
    with caplog.at_level("INFO", "lit_phi2"):
        trainer.fit(new_module(phi_dir, max_new_tokens=30), data)
    lengths.sort()
    assert 490 < lengths[-1][0] < 512
    assert lengths[-1][0] + lengths[-1][1] == 512, "the random base does not stop by itself"
    assert all(new == 30 for _, new in lengths[:-2])
    assert f"samples: at most {512 - lengths[-1][0]} tokens for 1 of 4 prompts" in caplog.text
    samples = list(read_json_lines(tmp_path / "run" / "version_0" / "samples.jsonl"))
    assert {sample["finish_reason"] for sample in samples} == {"length"}
    assert [sample["id"] for sample in samples[:4]] == ["r0", "r1", "r2", "r3"]


@pytest.mark.parametrize("character", [*LINE_ENDS, "\n", "\r\n", "\t"], ids=ascii)
def test_no_text_of_a_record_becomes_markup_in_tensorboard(character: str) -> None:
    text = f"one{character}# head{character}{character}- item{character}<b>bold</b> **bold**"
    sample = {"prompt": text, "reference": text, "completion": text, "finish_reason": "stop"}
    html = markdown_to_safe_html(to_markdown(sample))
    assert html.count("<pre><code>") == html.count("<strong>") == 3
    assert not any(tag in html for tag in ("<h1", "<li", "<b>"))
