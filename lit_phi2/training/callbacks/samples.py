"""SampleWriter: greedy completions of a few fixed validation prompts, before training and after every validation.

    step 0      completions of the base
    step k      completions after k optimizer steps, of the same prompts

They are written to TensorBoard as text and to samples.jsonl, one object a sample. Training is unaffected: generation
restores modes and cache flags, and draws no random number.

A signal ends the generation at once. The run is then saved, and writes these samples when it is resumed.
"""

import json
import logging
import textwrap
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from lit_phi2.audit.redaction import redact, redacted_id
from lit_phi2.errors import RunInterrupted
from lit_phi2.generation.engine import Completion
from lit_phi2.training.protocols import tokenizer_of, training_data
from lit_phi2.utils.files import atomic_write, read_json_lines
from lit_phi2.utils.signals import stop_request

log = logging.getLogger(__name__)

NUM_SAMPLES = 4
LINE_WIDTH = 100  # characters in a line of TensorBoard's text tab


class SampleWriter(Callback):
    """Writes samples/<k> to TensorBoard and a line a sample to samples.jsonl.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / "samples.jsonl"
        self.due_step: int | None = None  # a signal ended the generation of the samples of this step

    def state_dict(self) -> dict[str, Any]:
        return {"due_step": self.due_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.due_step = state_dict["due_step"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """On resume, write the samples that are due; not later, because a run whose steps are taken trains no more."""
        if trainer.is_global_zero and self.due_step is not None:
            self._write_samples(trainer, pl_module, self.due_step)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and trainer.state.fn == "fit":
            self._write_samples(trainer, pl_module, trainer.global_step)

    def _write_samples(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        data = training_data(trainer)
        split, tokenizer = data.splits["val"], tokenizer_of(data)
        examples = split.examples[:NUM_SAMPLES]
        self.due_step = step
        try:
            with stop_request.raised_at_once():
                completions = complete(pl_module, [example.ids[: example.prompt_length] for example in examples])
        except RunInterrupted:
            if stop_request.deferred:
                return  # the checkpoint callback stops all ranks together
            raise
        self.due_step = None
        with self.file.open("ab") as file:
            for index, (example, completion) in enumerate(zip(examples, completions, strict=True)):
                prompt = tokenizer.decode(example.ids[: example.prompt_length])
                texts = [str(prompt), split.records[index].response, str(tokenizer.decode(completion.ids))]
                sample: dict[str, object] = {
                    "step": step,
                    "id": redacted_id(example.id, example.location, data.output_kinds),
                    **dict(
                        zip(("prompt", "reference", "completion"), redact(texts, data.output_kinds).texts, strict=True)
                    ),
                    "finish_reason": completion.finish_reason,
                }
                file.write(_to_line(sample).encode())
                for logger in trainer.loggers:
                    if isinstance(logger, TensorBoardLogger):
                        logger.experiment.add_text(f"samples/{index}", to_markdown(sample), step)


def truncate_samples(folder: Path, step: int) -> None:
    """Drop the samples after an optimizer step from samples.jsonl."""
    file = folder / "samples.jsonl"
    if file.is_file():
        atomic_write(file, [_to_line(sample) for sample in read_json_lines(file) if sample["step"] <= step])


def complete(pl_module: pl.LightningModule, prompts: list[list[int]]) -> list[Completion]:
    """Completions of prompts, each no longer than the positions of the base that its prompt leaves."""
    num_positions = pl_module.fused_phi.config.max_position_embeddings
    limits = [min(pl_module.max_new_tokens, num_positions - len(prompt)) for prompt in prompts]
    completions: dict[int, Completion] = {}
    for limit in set(limits):
        indices = [index for index, other in enumerate(limits) if other == limit]
        if limit < pl_module.max_new_tokens:
            message = "samples: at most %d tokens for %d of %d prompts, because the base has %d positions"
            log.info(message, limit, len(indices), len(prompts), num_positions)
        batch = pl_module.generate([prompts[index] for index in indices], limit)
        completions.update(zip(indices, batch, strict=True))
    return [completions[index] for index in range(len(prompts))]


def _to_line(sample: dict[str, Any]) -> str:
    return json.dumps(sample, ensure_ascii=False) + "\n"


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
