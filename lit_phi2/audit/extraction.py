"""Extraction: texts with a secret -> the tokens before it and its own, which greedy decoding finishes or does not.

    prompt, "The member ID on file for case QXJTWK is M|48210977|."   ->  Target(prefix, secret)
    record of train whose response has a claim number                 ->  Target(prefix, secret)

An identifier that the prompt holds is no target: to repeat it is copying. Nor is one that records of train and val have
in common, such as a telephone number of the insurer, and a second use of a value in one response.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from lit_phi2.audit.identifiers import Identifier
from lit_phi2.audit.records import unsupported_identifiers
from lit_phi2.data.canaries import Canary
from lit_phi2.data.encode import tokenize
from lit_phi2.data.prompts import format_prompt
from lit_phi2.data.splits import Split
from lit_phi2.types import Example

MAX_IDENTIFIERS = 256  # of a split, evenly spaced: so many that no share is uncertain by more than 0.07


class Target(NamedTuple):
    """Token ids of a text up to a secret, and of the secret."""

    prefix: list[int]
    secret: list[int]


def canary_target(canary: Canary, tokenizer: PreTrainedTokenizerBase) -> Target:
    """The secret of a canary, after everything that training has before it."""
    prompt = format_prompt(canary.instruction, canary.input)
    text = prompt if canary.place == "prompt" else canary.response
    before = [] if canary.place == "prompt" else tokenize(tokenizer, [prompt])[0]
    start = text.index(canary.secret)
    return _target(before, text, start, start + len(canary.secret), tokenizer)


def identifier_targets(
    splits: Mapping[str, Split], records: Mapping[str, Sequence[int]], tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[Target]]:
    """The identifiers that responses of each split have, at most MAX_IDENTIFIERS.

    Args:
        splits: by name.
        records: by name of the split, the indices of the records that are searched.
        tokenizer: of the base.
    """
    found: dict[str, list[tuple[int, str, Identifier]]] = {
        name: [
            (index, value, identifier)
            for index in records[name]
            for value, identifier in unsupported_identifiers(split.records[index]).items()
        ]
        for name, split in splits.items()
    }
    values = [{value for _, value, _ in each} for each in found.values()]
    shared = set.intersection(*values) if len(values) > 1 else set()
    targets = {}
    for name, split in splits.items():
        remaining = [(index, each) for index, value, each in found[name] if value not in shared]
        count = min(len(remaining), MAX_IDENTIFIERS)
        chosen = [remaining[number * len(remaining) // count] for number in range(count)]
        targets[name] = [
            _target(_prompt(split.examples[index]), split.records[index].response, each.start, each.end, tokenizer)
            for index, each in chosen
        ]
    return targets


def _prompt(example: Example) -> list[int]:
    return example.ids[: example.prompt_length]


def _target(before: list[int], text: str, start: int, end: int, tokenizer: PreTrainedTokenizerBase) -> Target:
    """The characters start to end of a text as the secret; a token that is partly outside belongs to it."""
    engine: Any = tokenizer.backend_tokenizer
    engine.encode_special_tokens = True  # as in `tokenize`
    encoding = engine.encode(text, add_special_tokens=False)
    inside = [index for index, (first, last) in enumerate(encoding.offsets) if first < end and last > start]
    first, last = inside[0], inside[-1] + 1
    return Target(before + encoding.ids[:first], encoding.ids[first:last])
