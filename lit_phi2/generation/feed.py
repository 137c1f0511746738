"""Feed: prompts -> the engine, ahead of its slots -> completions as they end.

    prompts   7 6 5 4 3  ->  | waiting 5 4 3 | slots 7 6 |  ->  6, 7, 5, ...

Prompts are taken as the engine gets to them, so a source may be endless, or hold millions.
"""

from collections.abc import Iterable, Iterator, Sequence

from lit_phi2.generation.engine import Completion, Engine

AHEAD = 256  # prompts that may wait: from them the engine sees how long they are and which prefixes they share


def feed(
    engine: Engine, prompts: Iterable[tuple[int, Sequence[int]] | None], *, drain: bool = True
) -> Iterator[tuple[int, Completion]]:
    """Submit prompts, and yield each completion with its key when it ends.

    Args:
        engine: may hold prompts of an earlier call.
        prompts: keys and token ids; None says that the next prompt is not there yet.
        drain: whether all completions are waited for; otherwise at most AHEAD prompts wait at the end, for the next
            call.
    """
    for prompt in prompts:
        if prompt is None:
            yield from engine.step()
            continue
        engine.submit(*prompt)
        while engine.waiting > AHEAD:
            yield from engine.step()
    while drain and (engine.waiting or engine.active):
        yield from engine.step()
