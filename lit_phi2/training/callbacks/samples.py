"""Samples: greedy answers to a few fixed validation prompts, before training and after every validation.

    step 0      what the base says
    step k      what it says after k optimizer steps, under the same prompts

They go to TensorBoard as text and to samples.jsonl, one object a sample. Training does not notice: generation leaves
modes and cache flags as they were and draws no random number.
"""

import json
import textwrap
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from lit_phi2.utils.files import atomic_write

NUM_SAMPLES = 4
WIDTH = 100  # characters in a line of TensorBoard's text tab


class SampleWriter(Callback):
    """Writes samples/<k> to TensorBoard and a line for each to samples.jsonl.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / "samples.jsonl"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """On resume, cut the file back to the step that the run goes on from."""
        if not (trainer.is_global_zero and self.file.is_file()):
            return
        lines = self.file.read_text("utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= trainer.global_step]
        atomic_write(self.file, kept)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero or trainer.state.fn != "fit":
            return
        data = trainer.datamodule
        split = data.splits["val"]
        examples = split.examples[:NUM_SAMPLES]
        answers = pl_module.generate([example.ids[: example.prompt_length] for example in examples])
        with self.file.open("a", encoding="utf-8") as file:
            for index, (example, answer) in enumerate(zip(examples, answers, strict=True)):
                sample = {
                    "step": trainer.global_step,
                    "id": example.id,
                    "prompt": data.tokenizer.decode(example.ids[: example.prompt_length]),
                    "reference": split.records[index].response,
                    "completion": data.tokenizer.decode(answer.ids),
                    "finish_reason": answer.finish_reason,
                }
                file.write(json.dumps(sample, ensure_ascii=False) + "\n")
                for logger in trainer.loggers:
                    if isinstance(logger, TensorBoardLogger):
                        logger.experiment.add_text(f"samples/{index}", as_markdown(sample), trainer.global_step)


def as_markdown(sample: dict[str, object]) -> str:
    """A sample for TensorBoard's text tab: headings in bold, texts as they are in code blocks.

    >>> print(as_markdown({"prompt": "P", "reference": "R", "completion": "A", "finish_reason": "stop"}))
    **prompt**
    <BLANKLINE>
        P
    <BLANKLINE>
    **reference**
    <BLANKLINE>
        R
    <BLANKLINE>
    **completion** (stop)
    <BLANKLINE>
        A
    """
    parts = []
    for name in ("prompt", "reference", "completion"):
        note = f" ({sample['finish_reason']})" if name == "completion" else ""
        # Indented lines are code to Markdown, so nothing in a record is taken for markup; code does not wrap by itself.
        lines = [part for line in str(sample[name]).split("\n") for part in textwrap.wrap(line, WIDTH) or [""]]
        text = "\n".join("    " + line for line in lines)
        parts.append(f"**{name}**{note}\n\n{text}")
    return "\n\n".join(parts)
