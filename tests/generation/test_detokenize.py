"""Streamed text is whole characters, and joined it is what the tokenizer decodes at once."""

import random

import pytest
from transformers import PreTrainedTokenizerBase

from lit_phi2.generation.detokenize import IncrementalDetokenizer

TEXTS = [
    " The claim  was denied.\n\n  - code 97\t$120.00\n",
    "Señora Müller\u2019s café \u2013 日本語 🙂👩‍👩‍👧 naïve",
    "\ufffd is a character of its own\ufffd",
    "",
]


def stream(tokenizer: PreTrainedTokenizerBase, ids: list[int], size: int = 1) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer)
    return [*(detokenizer.add(ids[i : i + size]) for i in range(0, len(ids), size)), detokenizer.finish()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("size", [1, 3])
def test_the_pieces_joined_are_the_text(text: str, size: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Reference: the text itself."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = stream(tokenizer, ids, size)
    assert "".join(pieces) == text
    assert len(ids) < 3 or sum(map(bool, pieces)) > 1, "it is streamed"


def test_half_a_character_is_never_shown(tokenizer: PreTrainedTokenizerBase) -> None:
    """The tokenizer splits an emoji into several tokens; all of it appears with the last of them."""
    ids = tokenizer("a🙂b", add_special_tokens=False)["input_ids"]
    assert len(ids) > 3
    pieces = stream(tokenizer, ids)
    assert [piece for piece in pieces if piece] == ["a", "🙂", "b"]
    assert not any("\ufffd" in piece for piece in pieces)


def test_any_tokens_stream_as_they_decode(tokenizer: PreTrainedTokenizerBase) -> None:
    """Random tokens are mostly bytes that are no text. Reference: the tokenizer's decoding of all at once."""
    draw = random.Random(0)
    for _ in range(50):
        ids = [draw.randrange(300 if draw.random() < 0.5 else len(tokenizer)) for _ in range(30)]
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_cut_character_at_the_end_is_marked(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("a🙂", add_special_tokens=False)["input_ids"][:-1]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)
    assert stream(tokenizer, ids)[-1].startswith("\ufffd")
