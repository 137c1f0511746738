"""Parser: jsonargparse's, with our error messages, and with configs in UTF-8 that give every key once."""

import contextlib
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import set_loader
from lightning.pytorch.cli import LightningArgumentParser

from lit_phi2.cli.arguments import ALLOWED_CLASS_NAMES, known_keys
from lit_phi2.cli.configs import load_value
from lit_phi2.cli.messages import humanize_parser_error
from lit_phi2.errors import InputError

_MODE = "yaml_with_unique_keys"
set_loader(_MODE, load_value, (yaml.YAMLError,))


class Parser(LightningArgumentParser):
    """Raises an InputError with a short message, where jsonargparse prints its usage and exits."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An abbreviated --config would not be found among the arguments, and so would not be checked.
        super().__init__(*args, **{"parser_mode": _MODE, "allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise InputError(humanize_parser_error(message, known_keys(self), ALLOWED_CLASS_NAMES)) from ex

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Parse a config, which is UTF-8 whatever the locale; paths of configs in it are relative to its folder."""
        text = Path(path).read_text("utf-8")
        with contextlib.chdir(Path(path).absolute().parent):
            return self.parse_string(text, Path(path).name, *args, **kwargs)
