r"""Detokenize: tokens as they are generated -> the text that they add.

    tokens     " caf"   "\xc3"   "\xa9"   ","
    text       " caf"   ""       "é"      ","        half a character waits for its other half

The pieces joined are the tokenizer's decoding of all tokens, byte for byte.
"""

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"  # what bytes that are no UTF-8 decode to; at the end they may be the start of a character


class IncrementalDetokenizer:
    """Decodes a completion while it grows.

    All tokens are decoded at every call: a token alone may lose its leading space, and a completion of 2,048 tokens is
    decoded in half a millisecond.

    Args:
        tokenizer: of the base.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.num_emitted = 0  # characters

    def add(self, ids: Iterable[int]) -> str:
        """The text that is complete with these tokens, and was not before; may be empty."""
        self.ids.extend(ids)
        return self._emit(self._decode().rstrip(_REPLACEMENT))

    def finish(self) -> str:
        """The rest of the text: bytes at its end that are no character, each run as U+FFFD."""
        return self._emit(self._decode())

    def _decode(self) -> str:
        return str(self.tokenizer.decode(self.ids))

    def _emit(self, text: str) -> str:
        added = text[self.num_emitted :]
        self.num_emitted = max(self.num_emitted, len(text))
        return added
