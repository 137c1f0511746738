"""Messages: turn jsonargparse's errors into plain sentences; text in, text out.

    Parser key "model.lora_r": Expected a <class 'int'>. Got value: abc
      -> key "model.lora_r": Expected int. Got value: abc
    unrecognized arguments: --model.lora_rank 2
      -> unrecognized arguments: --model.lora_rank 2. Did you mean 'model.lora_r'?

jsonargparse raises all errors as text, so they are recognized by their words. A text that no pattern matches passes
through unchanged, which is the result when a new version of jsonargparse words an error differently.
"""

import difflib
import re
from collections.abc import Sequence


def humanize_parser_error(message: str, known: Sequence[str], allowed_classes: Sequence[str]) -> str:
    """jsonargparse's message without the parser's vocabulary, and with the nearest key.

    Args:
        message: of jsonargparse.
        known: every key of the parser.
        allowed_classes: names of the classes that a config may name.
    """
    if match := re.search(r"(?s)(?:Parser key (\S+):)?.*Importing '([\w.]+)' is not allowed", message):
        return (
            f"key {match[1]}: names {match[2]}, but a config may name only {', '.join(allowed_classes)}, because other "
            f"classes could run any code. If you trust it: --allow_classes {match[2]}"
        )
    message = message.replace("Parser key ", "key ").replace("Validation failed: ", "")
    message = re.sub(r"(a )?<class '([\w.]+)'>", r"\2", message).replace("NoneType", "null")
    union = r"Does not validate[^\[]*\[(.*)\](?s:.*?)Given value: "
    message = re.sub(union, r"Expected one of \1. Got value: ", message)
    if match := re.search(r"unrecognized arguments: (\S+\.ya?ml)", message):
        return f"{message}. Did you mean --config {match[1]}?"
    if re.search(r"unrecognized arguments: [^-]", message):
        return f"{message}. Give several values of one key as a list: '[a, b]'."
    if match := re.search(r"unrecognized arguments: --([\w.]+)", message):
        return f"{message}.{did_you_mean(match[1], known)}"
    return message


def did_you_mean(key: str, known: Sequence[str]) -> str:
    """A hint that names the nearest key, also if only the section is wrong or missing; empty without one.

    >>> did_you_mean("data.lora_r", ["model.lora_r", "data.max_length"])
    " Did you mean 'model.lora_r'?"
    """
    last = key.rpartition(".")[2]
    same_name = [name for name in known if name.rpartition(".")[2] == last]
    if nearest := (same_name or difflib.get_close_matches(key, known, n=1, cutoff=0.6)):
        return f" Did you mean {nearest[0]!r}?"
    return ""
