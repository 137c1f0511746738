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
from collections.abc import Mapping, Sequence
from typing import Any

_QUOTE = ". A duration is a text: '00:01:30:00' for an hour and a half."
_HINTS = {
    "trainer.max_time": _QUOTE,
    "trainer.val_check_interval": _QUOTE,
    "trainer.precision": ". Leave it out: the compute dtype is model.dtype, and LoRA weights are always float32.",
}

# Of a subcommand, the records that it reads.
_DATA_KEYS = {
    "fit": ("train_files", "val_files"),
    "inspect": ("train_files", "val_files"),
    "validate": ("val_files",),
    "test": ("test_files",),
    "predict": ("predict_files",),
}


def humanize_parser_error(message: str, known: Sequence[str], allowed_classes: Sequence[str]) -> str:
    """jsonargparse's message without the parser's vocabulary, and with the nearest key.

    Args:
        message: of jsonargparse.
        known: every key of the parser.
        allowed_classes: names of the classes that a config may name.
    """
    if match := re.search(r"(?s)(?:Parser key (\S+):)?.*Importing '([\w.]+)' is not allowed", message):
        if match[2].startswith("lit_phi2."):
            return f"key {match[1]}: names {match[2]}, which a config cannot; every run has what it needs of lit_phi2."
        return (
            f"key {match[1]}: names {match[2]}, but a config may name only {', '.join(allowed_classes)}, because other "
            f"classes could run any code. If you trust it: --allow_classes {match[2]}"
        )
    message = message.replace("Parser key ", "key ").replace("Validation failed: ", "")
    message = re.sub(r"(a )?<class '([\w.]+)'>", r"\2", message).replace("NoneType", "null")
    union = r"Does not validate[^\[]*\[(.*)\](?s:.*?)Given value: "
    message = re.sub(union, r"Expected one of \1. Got value: ", message)
    message = _shorten_types(message).replace("Got value: None", "Got value: null")
    if match := re.match(r'key "([\w.]+)"', message):
        message += _HINTS.get(match[1], "")
    if match := re.search(r"unrecognized arguments: (\S+\.ya?ml)", message):
        return f"{message}. Did you mean --config {match[1]}?"
    if re.search(r"unrecognized arguments: [^-]", message):
        return f"{message}. Give several values of one key as a list: '[a, b]'."
    if match := re.search(r"unrecognized arguments: --([\w.]+)", message):
        return f"{message}.{did_you_mean(match[1], known)}"
    return message


def _shorten_types(message: str) -> str:
    """jsonargparse's message with types as a user writes them, and without the paths that it tried.

    >>> _shorten_types("Expected one of a.b.Timer, typing.Literal['step', 'epoch'], null. Got value: 0")
    "Expected one of Timer, 'step', 'epoch', null. Got value: 0"
    """
    expected, found, value = message.partition(". Got value: ")
    if not found:
        return message
    expected = re.sub(r"(?m)^ *- Expected a path but .*\n", "", expected)
    expected = re.sub(r"typing\.(?:Literal|Union)\[([^\]]*)\]", r"\1", expected)
    start = expected.rfind("Expected one of ")
    expected = expected[:start] + re.sub(r"(?<![\w'.])(?:\w+\.)+(\w+)", r"\1", expected[start:])
    return re.sub(r":\n\s*(?:- )?(?=Expected[^\n]*$)", ": ", expected) + found + value


def class_error(message: str) -> str | None:
    """jsonargparse's message about a class whose arguments the class itself refuses; None for other messages."""
    name, reason = re.search(r"class_path='[\w.]*?(\w+)'", message), re.search(r"(?m)^  - (.*)$", message)
    if name is None or reason is None:
        return None
    return f"trainer: {name[1]} cannot be built with these init_args: {reason[1].rstrip('.')}."


def name_trainer_key(message: str, keys: Sequence[str]) -> str:
    """Lightning's message about a setting of its Trainer, with the key in front.

    >>> name_trainer_key("`Trainer(devices='x')` value is not a valid input", ["accelerator", "devices"])
    "trainer.devices: `Trainer(devices='x')` value is not a valid input"
    """
    named = [key for key in keys if re.search(rf"`{key}`|\b{key}=", message)]
    return f"{'.'.join(['trainer', *named[:1]])}: {message}"


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


def describe_defaults(
    subcommand: str, model: Mapping[str, Any], data: Mapping[str, Any], *, reads_data: bool = True
) -> str:
    """One line for a command without a config: the base and the data that it takes, and how to give others.

    >>> print(describe_defaults("test", {"base": "tiny"}, {"test_files": "claims:test"}))
    without --config: model.base tiny, data.test_files claims:test. To take others: --config FILE, or these as flags.
    """
    keys = _DATA_KEYS.get(subcommand, ()) if reads_data else ()
    values = [f"model.base {model['base']}", *(f"data.{key} {_as_yaml(data[key])}" for key in keys)]
    return f"without --config: {', '.join(values)}. To take others: --config FILE, or these as flags."


def _as_yaml(value: Any) -> Any:
    """A value as a config or a flag gives it.

    >>> [str(_as_yaml(value)) for value in (None, "a.jsonl", ["a.jsonl", "b.jsonl"])]
    ['null', 'a.jsonl', '[a.jsonl, b.jsonl]']
    """
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return "null" if value is None else value
