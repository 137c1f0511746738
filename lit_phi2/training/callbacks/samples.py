"""SampleWriter: greedy completions of a few fixed validation prompts, before training and after every validation.

    step 0      completions of the base
    step k      completions after k optimizer steps, of the same prompts

They are written to TensorBoard as text and to samples.jsonl, one object a sample. Training is unaffected: generation
restores modes and cache flags, and draws no random number.
"""

import json
import textwrap
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from lit_phi2.training.protocols import tokenizer_of, training_data
from lit_phi2.utils.files import atomic_write

NUM_SAMPLES = 4
LINE_WIDTH = 100  # characters in a line of TensorBoard's text tab


class SampleWriter(Callback):
    """Writes samples/<k> to TensorBoard and a line a sample to samples.jsonl.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / "samples.jsonl"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """On resume, drop the samples after the resumed step."""
        if not (trainer.is_global_zero and self.file.is_file()):
            return
        lines = self.file.read_text("utf-8").splitlines(keepends=True)
        lines = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= trainer.global_step]
        atomic_write(self.file, lines)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero or trainer.state.fn != "fit":
            return
        data = training_data(trainer)
        split, tokenizer = data.splits["val"], tokenizer_of(data)
        examples = split.examples[:NUM_SAMPLES]
        completions = pl_module.generate([example.ids[: example.prompt_length] for example in examples])
        with self.file.open("a", encoding="utf-8") as file:
            for index, (example, completion) in enumerate(zip(examples, completions, strict=True)):
                sample = {
                    "step": trainer.global_step,
                    "id": example.id,
                    "prompt": tokenizer.decode(example.ids[: example.prompt_length]),
                    "reference": split.records[index].response,
                    "completion": tokenizer.decode(completion.ids),
                    "finish_reason": completion.finish_reason,
                }
                file.write(json.dumps(sample, ensure_ascii=False) + "\n")
                for logger in trainer.loggers:
                    if isinstance(logger, TensorBoardLogger):
                        logger.experiment.add_text(f"samples/{index}", to_markdown(sample), trainer.global_step)


def to_markdown(sample: dict[str, object]) -> str:
    """A sample for TensorBoard's text tab: bold headings, and texts verbatim in code blocks.

    >>> print(to_markdown({"prompt": "P", "reference": "R", "completion": "A", "finish_reason": "stop"}))
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
        # Markdown shows indented lines as code, so no text of a record becomes markup; code blocks do not wrap.
        lines = [chunk for line in str(sample[name]).split("\n") for chunk in textwrap.wrap(line, LINE_WIDTH) or [""]]
        text = "\n".join("    " + line for line in lines)
        parts.append(f"**{name}**{note}\n\n{text}")
    return "\n\n".join(parts)
