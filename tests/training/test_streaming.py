"""One completion on the terminal: pieces as they come, whole characters, none of control. The engine is scripted."""

import io
import re
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from lit_phi2.generation.engine import Completion
from lit_phi2.generation.streaming import stream_completion
from lit_phi2.training.streaming import print_completion


class ScriptedEngine:
    """Chooses one token of a text in each step, as the engine does."""

    def __init__(self, ids: list[int], finish_reason: Any = "stop") -> None:
        self.ids, self.finish_reason = ids, finish_reason
        self.waiting = self.active = self.num_steps = 0
        self.on_tokens: Any = None

    def submit(self, key: int, prompt: Sequence[int]) -> None:
        self.key, self.active = key, 1

    def step(self) -> list[tuple[int, Completion]]:
        if self.num_steps < len(self.ids):
            self.num_steps += 1
            self.on_tokens(self.key, [self.ids[self.num_steps - 1]])
            return []
        self.active = 0
        return [(self.key, Completion(self.ids, self.finish_reason))]


class Terminal(io.TextIOWrapper):
    def __init__(self) -> None:
        super().__init__(io.BytesIO(), "utf-8")

    def isatty(self) -> bool:
        return True

    @property
    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode()  # type: ignore[attr-defined]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_each_piece_is_written_when_its_token_is_chosen(tokenizer: PreTrainedTokenizerBase) -> None:
    """All text of the first tokens is out before the engine takes another step."""
    text = " The claim was denied: naïve 🙂 end"
    engine: Any = ScriptedEngine(encode(tokenizer, text))
    written: list[tuple[int, str]] = []
    streamed = stream_completion(engine, [1], tokenizer, lambda piece: written.append((engine.num_steps, piece)))
    assert "".join(piece for _, piece in written) == text
    assert written[0] == (1, tokenizer.decode(engine.ids[:1]))
    assert not any("\ufffd" in piece for _, piece in written)
    assert streamed.completion.ids == engine.ids
    assert 0 <= streamed.first_seconds <= streamed.seconds


def test_no_control_character_reaches_a_terminal(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is split into tokens; a line feed stays. A file gets the text as it is."""
    text = "red \x1b[31m\u202e\nnext\x9b\x07"
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    print_completion(ScriptedEngine(encode(tokenizer, text)), [1], tokenizer)  # type: ignore[arg-type]
    assert terminal.text == "red \\x1b[31m\\u202e\nnext\\x9b\\x07\n"
    file = io.TextIOWrapper(io.BytesIO(), "utf-8", newline="\n")
    monkeypatch.setattr(sys, "stdout", file)
    print_completion(ScriptedEngine(encode(tokenizer, text)), [1], tokenizer)  # type: ignore[arg-type]
    assert file.buffer.getvalue().decode() == text + "\n"  # type: ignore[attr-defined]


def test_identifiers_are_placeholders_before_they_are_written(
    tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the number that the value has in the question."""
    text = " Of CLM-2024-00099, as CLM-2024-00017."
    print_completion(
        ScriptedEngine(encode(tokenizer, text)),  # type: ignore[arg-type]
        [1],
        tokenizer,
        question=["Why CLM-2024-00017?", ""],
        kinds=["claim_number"],
    )
    assert capsys.readouterr().out == " Of [CLAIM_NUMBER_2], as [CLAIM_NUMBER_1].\n"


@pytest.mark.parametrize(
    ("text", "reason", "expected"),
    [
        (
            " Because of the plan.",
            "stop",
            r"^\d+ tokens, [\d,.]+ tokens/s, the first after \d+\.\d\d s; ended with EOS$",
        ),
        (" Because of the", "length", r"tokens/s, .*; stopped at model\.max_new_tokens$"),
        ("", "stop", r"^0 tokens, after \d+\.\d\d s; ended with EOS$"),
        (" no no no no no no no no no no no no no no no no no no no no no no no", "length", "It repeats itself up to"),
    ],
)
def test_the_last_line_says_how_fast_and_why_it_ended(
    text: str,
    reason: str,
    expected: str,
    tokenizer: PreTrainedTokenizerBase,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with caplog.at_level("INFO", "lit_phi2"):
        print_completion(ScriptedEngine(encode(tokenizer, text), reason), [1], tokenizer)  # type: ignore[arg-type]
    assert any(re.search(expected, message) for message in caplog.messages), caplog.messages
    assert capsys.readouterr().out == text + "\n"
