"""Outputs: a completion -> plain values -> a prediction with its record; and the totals of all.

    Completion         ->  {"index", "completion", "finish_reason", "new_tokens"}, and "repeats" if it loops
    that and a Record  ->  {"id", "instruction", "input", "reference", "completion", ...}
    all of them        ->  30 completions, 2,114 tokens (555 tokens/s), 1 (3.3 %) stopped at model.max_new_tokens

What predict, test and standard output say of completions comes from here, so it is the same everywhere. Identifiers of
the kinds that data.redact_output names become placeholders here: in the completion first, which is stored before its
record is added, and then in the record.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lit_phi2.audit.redaction import redact, redacted_id
from lit_phi2.data.records import Record
from lit_phi2.generation.engine import Completion
from lit_phi2.generation.repetition import ends_in_cycle
from lit_phi2.types import Example


def to_output(index: int, completion: Completion, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A completion as text.

    Args:
        index: of its record.
        completion: what the model generated.
        tokenizer: of the base.
    """
    return {"index": index, "completion": tokenizer.decode(completion.ids), **describe_end(completion)}


def describe_end(completion: Completion) -> dict[str, Any]:
    """Why and after how many tokens a completion ended; `repeats` is there only if it loops until max_new_tokens."""
    repeats = completion.finish_reason == "length" and ends_in_cycle(completion.ids)
    end = {"finish_reason": completion.finish_reason, "new_tokens": len(completion.ids)}
    return end | ({"repeats": True} if repeats else {})


def redact_output(record: Record, output: Mapping[str, Any], kinds: Collection[str]) -> dict[str, Any]:
    """An output of `to_output` with placeholders in its completion; a value of the record has the record's.

    Args:
        record: that was completed.
        output: of `to_output`.
        kinds: of identifiers.
    """
    return {**output, "completion": redact([*_texts(record), output["completion"]], kinds).texts[-1]}


def to_prediction(
    record: Record, example: Example, output: Mapping[str, Any], kinds: Collection[str] = ()
) -> dict[str, Any]:
    """A line of predictions.jsonl.

    Args:
        record: `reference` is written only if it has a response.
        example: `truncated` is written only if the prompt was shortened.
        output: of `to_output`; with kinds, of `redact_output`.
        kinds: of identifiers that are written as placeholders.
    """
    instruction, input, reference = redact(_texts(record), kinds).texts
    return {
        "id": redacted_id(record.id, record.location, kinds),
        "instruction": instruction,
        "input": input,
        **({"reference": reference} if reference else {}),
        **{name: output[name] for name in ("completion", "finish_reason", "new_tokens")},
        **({"truncated": True} if example.truncated else {}),
    }


def _texts(record: Record) -> list[str]:
    return [record.instruction, record.input, record.response]


@dataclass
class CompletionSummary:
    """Totals of completions.

    Attributes:
        num_completions, num_tokens: all.
        num_at_limit: completions that stopped at model.max_new_tokens.
        num_repeating: those of them that end in a loop.
    """

    num_completions: int = 0
    num_tokens: int = 0
    num_at_limit: int = 0
    num_repeating: int = 0

    def add(self, output: Mapping[str, Any]) -> None:
        """Count an output of `to_output` or `describe_end`."""
        self.num_completions += 1
        self.num_tokens += output["new_tokens"]
        self.num_at_limit += output["finish_reason"] == "length"
        self.num_repeating += output.get("repeats", False)

    def describe(self, seconds: float, *, num_tokens: int | None = None) -> str:
        """One line: completions, tokens, tokens a second, and the share that stopped at model.max_new_tokens.

        Args:
            seconds: that they took; 0 leaves the speed out.
            num_tokens: those that were generated in this time; None for all.

        >>> CompletionSummary(40, 1000, 1, 0).describe(2.0)
        '40 completions, 1,000 tokens (500 tokens/s), 1 (2.5 %) stopped at model.max_new_tokens'
        """
        generated = self.num_tokens if num_tokens is None else num_tokens
        speed = f" ({generated / seconds:,.0f} tokens/s)" if seconds and generated else ""
        noun = "completion" if self.num_completions == 1 else "completions"
        at_limit = f"{self.num_at_limit:,} ({self._share(self.num_at_limit)}) stopped at model.max_new_tokens"
        return f"{self.num_completions:,} {noun}, {self.num_tokens:,} tokens{speed}, {at_limit}"

    def repetition_warning(self) -> str | None:
        """A line for completions that loop; None if there are none."""
        if not self.num_repeating:
            return None
        verb = "repeats itself" if self.num_repeating == 1 else "repeat themselves"
        share = self._share(self.num_repeating)
        return (
            f"{self.num_repeating:,} of {self.num_completions:,} completions ({share}) {verb} up to "
            "model.max_new_tokens. Greedy decoding does not leave a loop: train longer or on more records; a higher "
            "limit only makes them longer."
        )

    def _share(self, count: int) -> str:
        return f"{100 * count / max(1, self.num_completions):.3g} %"
