"""Subcommands: their names and the help of the program, without any import that takes seconds.

train --config tiny.yaml   ->  InputError: 'train' is no subcommand. Did you mean fit?
--help, --version          ->  text
"""

import difflib
import textwrap
from collections.abc import Sequence

from lit_phi2 import __version__
from lit_phi2.errors import InputError

# As in the docstrings of the Trainer's methods.
SUBCOMMANDS = {
    "fit": "Train the adapter.",
    "validate": "Measure loss, perplexity and token accuracy on val_files.",
    "test": "Measure the loss on test_files, then score completions of its records beside baselines.",
    "predict": "Complete the records of predict_files, or one instruction, greedily.",
    "inspect": "Print statistics of the data, a memory plan, the caches, and one example; no model is loaded.",
    "export": "Write an adapter, or the merged model, for another runtime, and check it there.",
    "audit": "Rank suspect training records by path:line, or measure how far an adapter gives its records away.",
    "verify": "Check a run, an adapter or an export, or look up which records were trained on.",
    "report": "Write one page about a run: curves, metrics, completions, audits, settings, provenance.",
}
_OTHER_NAMES = {
    "fit": "train training finetune fine-tune fine_tune tune learn run start resume continue",
    "validate": "val valid validation eval evaluate evaluation",
    "test": "eval evaluate evaluation score benchmark",
    "predict": "prediction generate generation infer inference complete completion answer ask chat sample",
    "inspect": "data dataset stats statistics show check info preview describe",
    "export": "save convert merge write",
    "audit": "clean dedup duplicates labels leakage",
    "verify": "provenance ledger check sign signature replay reproduce",
    "report": "html page dashboard summary plot curves",
}
_HELP = """\
usage: lit-phi2 SUBCOMMAND [--config FILE ...] [--KEY VALUE ...]

Fine-tune Phi-2 with LoRA on instruction/response records.

subcommands, each with --help:
{subcommands}

options:
  --config FILE        a YAML file of settings; tiny.yaml, tiny-full.yaml and
                       phi2.yaml are packaged; several are read in their order
  --allow_classes A,B  let configs name these classes, too
  --version            print the version

To try it, without a network: lit-phi2 fit --config tiny.yaml"""


def early_answer(arguments: Sequence[str]) -> str | None:
    """What --help or --version print where a subcommand is expected; None for any other command line.

    Raises:
        InputError: there is no subcommand, or an unknown one.
    """
    _, rest = pop_option(arguments, "--config", "-c")
    _, rest = pop_option(rest, "--allow_classes")
    first = rest[0] if rest else ""
    if first in ("-h", "--help", "help"):
        return program_help()
    if first == "--version":
        return f"lit-phi2 {__version__}"
    if first not in SUBCOMMANDS:
        raise InputError(_unknown_subcommand(first, rest))
    return None


def pop_option(arguments: Sequence[str], *names: str) -> tuple[list[str], list[str]]:
    """The values of an option, given as `--name value` or `--name=value`, and the arguments without it."""
    values: list[str] = []
    rest: list[str] = []
    iterator = iter(arguments)
    for argument in iterator:
        name, equals, value = argument.partition("=")
        if name in names:
            values.append(value if equals else next(iterator, ""))
        elif argument[:2] in names and argument[1:2] != "-":  # -cFILE
            values.append(argument[2:])
        else:
            rest.append(argument)
    return values, rest


def program_help() -> str:
    """The help of the program, at most 80 columns wide."""
    lines = []
    for name, meaning in SUBCOMMANDS.items():
        lines += textwrap.wrap(meaning, 80, initial_indent=f"  {name:10}", subsequent_indent=" " * 12)
    return _HELP.format(subcommands="\n".join(lines))


def _unknown_subcommand(name: str, arguments: Sequence[str]) -> str:
    if not name:
        return f"a subcommand is missing.\n\n{program_help()}"
    expected = f"Subcommands: {', '.join(SUBCOMMANDS)}."
    if name.startswith("-"):
        later = next((argument for argument in arguments if argument in SUBCOMMANDS), "fit")
        return f"{name}: the subcommand comes first, as in: lit-phi2 {later} {name} ... {expected}"
    nearest = nearest_subcommands(name)
    hint = f" Did you mean {' or '.join(nearest)}?" if nearest else ""
    return f"{name!r} is no subcommand.{hint} {expected}"


def nearest_subcommands(name: str) -> list[str]:
    """The subcommands that another program's name stands for, or the one that is spelled nearly the same.

    >>> nearest_subcommands("train"), nearest_subcommands("eval"), nearest_subcommands("predcit")
    (['fit'], ['validate', 'test'], ['predict'])
    """
    name = name.lower()
    same = [subcommand for subcommand, others in _OTHER_NAMES.items() if name in others.split()]
    return same or difflib.get_close_matches(name, SUBCOMMANDS, n=1)
