"""Streaming: one prompt -> its completion as text, piece by piece, and how long it took.

prompt  ->  " The"  " claim"  " was"  ...  ->  StreamedCompletion
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lit_phi2.generation.detokenize import IncrementalDetokenizer
from lit_phi2.generation.engine import Completion, Engine


@dataclass(frozen=True, slots=True)
class StreamedCompletion:
    """A completion, and when its tokens came.

    Attributes:
        completion: as any other.
        first_seconds: from the prompt to the first token, or to EOS if there is none.
        seconds: from the prompt to the end.
    """

    completion: Completion
    first_seconds: float
    seconds: float

    def describe(self) -> str:
        """One line: tokens, speed, time to the first, and why it ended.

        >>> StreamedCompletion(Completion([7] * 11, "stop"), 0.25, 1.25).describe()
        '11 tokens, 10 tokens/s, the first after 0.25 s; ended with EOS'
        """
        num_tokens = len(self.completion.ids)
        parts = [f"{num_tokens} tokens"]
        if num_tokens > 1:  # the first is that of the prompt's pass
            parts.append(f"{(num_tokens - 1) / max(self.seconds - self.first_seconds, 1e-9):,.3g} tokens/s")
        parts.append(f"the first after {self.first_seconds:.2f} s" if num_tokens else f"after {self.seconds:.2f} s")
        at_limit = self.completion.finish_reason == "length"
        return ", ".join(parts) + ("; stopped at model.max_new_tokens" if at_limit else "; ended with EOS")


def stream_completion(
    engine: Engine, prompt: Sequence[int], tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]
) -> StreamedCompletion:
    """Complete a prompt, and write its text as it grows.

    Args:
        engine: without other prompts.
        prompt: token ids.
        tokenizer: of the base.
        write: takes each piece of text.
    """
    detokenizer = IncrementalDetokenizer(tokenizer)
    times: list[float] = []

    def on_tokens(key: int, ids: list[int]) -> None:
        times.append(time.monotonic())
        write(detokenizer.add(ids))

    engine.on_tokens = on_tokens
    started = time.monotonic()
    engine.submit(0, prompt)
    ended: list[tuple[int, Completion]] = []
    while engine.waiting or engine.active:
        ended += engine.step()
    seconds = time.monotonic() - started
    write(detokenizer.finish())
    return StreamedCompletion(ended[0][1], times[0] - started if times else seconds, seconds)
