"""Pretrained: from the name of a base in a config to its folder on disk, its tokenizer and its fingerprint.

    tiny             the packaged tiny Phi
    a folder         any Phi in Hugging Face form: config.json, *.safetensors, tokenizer.json
    owner/name       on the hub, downloaded once into the hub's own cache; the only download of a run

Only safetensors are read, and code that comes with a model is never run.
"""

import functools
import re
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lit_phi2.base_config import CONFIG_FILE, read_base_config
from lit_phi2.base_digest import FileState, base_digest, base_files
from lit_phi2.errors import InputError
from lit_phi2.utils.json_objects import OBJECT, TEXT, Kind, check_values, integer, nullable, number, read_json_object
from lit_phi2.utils.paths import expand_user

TINY_PHI_DIR = Path(__file__).parent / "assets" / "tiny-phi"
PHI2 = "microsoft/phi-2"
# Owners of a hub id that are more likely the folder of a base.
_FOLDER_NAME = re.compile(
    r"(?i)(models?|bases?|checkpoints?|ckpts?|weights|pretrained|runs?|data|assets|cache|downloads?|exports?|llms?|"
    r"local|out|outputs?|results?|tests?|tmp)"
)
_HUB_FILES = ["*.json", "*.safetensors", "merges.txt", "vocab.json"]
_INDEX_FILE = "model.safetensors.index.json"
_WEIGHTS_FILE = "model.safetensors"
_TOKENIZER_FILE = "tokenizer.json"
_TOKENIZER_CONFIG_FILE = "tokenizer_config.json"

_HOW_TO_GET_PHI2 = (
    "For the real Phi-2 (5.6 GB, MIT licence) run\n"
    "    hf download microsoft/phi-2\n"
    "once on a machine with network, or give the folder of a copy: --model.base /path/to/phi-2. "
    "--model.base tiny is packaged and needs neither."
)


@dataclass(frozen=True)
class BaseModel:
    """A base on disk.

    Attributes:
        name: as the config gives it, a folder made absolute; enough to load it again.
        folder: where its files are.
        revision: the commit on the hub; empty for a folder.
        weight_files: names of the files that hold its weights, as its index lists them; others are not read.
        files: the state of every file that decides what it computes, when it was found.
    """

    name: str
    folder: Path
    revision: str
    weight_files: tuple[str, ...]
    files: tuple[FileState, ...]

    @functools.cached_property
    def digest(self) -> str:
        """Of its config, tokenizer and weights (`base_digest.py`); computed on first access, which can take seconds.

        Raises:
            InputError: a file cannot be read, or changed since the base was found.
        """
        return base_digest(self.folder, self.files)

    @property
    def public_name(self) -> str:
        """The hub id, or of a folder the last part: no path of this machine."""
        return self.name if self.revision else PurePath(self.name).name or "base"

    def fingerprint(self) -> dict[str, str]:
        """What a checkpoint stores to recognise the base."""
        return {"base": self.name, "base_revision": self.revision, "base_digest": self.digest}


def resolve_base_model(name: str) -> BaseModel:
    """Find the base that a config names; download it if it is on the hub and not in the hub's cache.

    Raises:
        InputError: there is no such base, no network to download it, or the folder holds no Phi.
    """
    if name == "tiny":
        folder, revision = TINY_PHI_DIR, ""
    elif expand_user(name, "model.base").is_dir():
        folder, revision = expand_user(name, "model.base").resolve(), ""
        name = str(folder)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        folder = _download(name)
        revision = folder.name
    else:
        raise InputError(
            f"model.base: {name!r} is neither a folder nor a hub id (owner/name) nor 'tiny'.\n{_HOW_TO_GET_PHI2}"
        )
    _check_is_phi(folder)
    weight_files = _find_weight_files(folder)
    return BaseModel(name, folder, revision, weight_files, base_files(folder, weight_files))


def load_tokenizer(base: BaseModel) -> PreTrainedTokenizerBase:
    """Load the base's tokenizer.

    Raises:
        InputError: its files cannot be used, it has more tokens than the base has embeddings, or it has no EOS token,
            so that the model could not learn to stop.
    """
    file, config_file = base.folder / _TOKENIZER_FILE, base.folder / _TOKENIZER_CONFIG_FILE
    known_tokens = _check_tokenizer_files(base.folder)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            base.folder, local_files_only=True, trust_remote_code=False
        )
    except BaseException as error:  # of many kinds, from transformers and from Rust, whose panic is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"model.base: {file} cannot be used ({type(error).__name__}: {error}).") from error
    if not tokenizer.is_fast:
        raise InputError(f"model.base: the tokenizer in {base.folder} does not read {_TOKENIZER_FILE}.")
    if tokenizer.eos_token_id is None:
        raise InputError(f"model.base: {config_file}: has no eos_token, the EOS token that ends every response.")
    if tokenizer.eos_token not in known_tokens:
        raise InputError(
            f"model.base: {config_file}: eos_token is {tokenizer.eos_token!r}, which the vocabulary in "
            f"{_TOKENIZER_FILE} lacks."
        )
    highest, num_rows = max(tokenizer.get_vocab().values()), int(read_model_config(base)["vocab_size"])
    if highest >= num_rows:
        raise InputError(
            f"model.base: {file} has token ids up to {highest}, but vocab_size in {CONFIG_FILE} is {num_rows}."
        )
    return tokenizer


def read_model_config(base: BaseModel) -> dict[str, Any]:
    """Read the base's config.json: the keys that decide what it computes, checked."""
    return read_base_config(base.folder)


def _download(name: str) -> Path:
    # Imported here, so that a run on a local base never loads the hub client.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES, local_files_only=True))
    except LocalEntryNotFoundError:
        _check_is_no_path(name)  # not in the cache, so the network would be asked
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"model.base: {name!r} is not on this machine and could not be downloaded "
            f"({type(error).__name__}).\n{_HOW_TO_GET_PHI2}"
        ) from error


def _check_is_no_path(name: str) -> None:
    """Refuse to look up on the hub what is probably a folder that is missing, or meant from another folder."""
    owner = name.partition("/")[0]
    if name != PHI2 and (_FOLDER_NAME.fullmatch(owner) or Path(owner).is_dir()):
        raise InputError(
            f"model.base: there is no folder {name} in {Path.cwd()}. {name} could also be the hub id of an owner "
            f"named {owner!r}; because {owner} looks like a folder, the hub is not asked.\n"
            f"    a folder: give its path, as in --model.base /path/to/{name}\n"
            f"    a hub id: download it once with: hf download {name}"
        )


def _check_is_phi(folder: Path) -> None:
    if not (folder / CONFIG_FILE).is_file():
        raise InputError(
            f"model.base: {folder} has no config.json, so it is not a model in Hugging Face form.\n{_HOW_TO_GET_PHI2}"
        )
    read_base_config(folder)
    if not (folder / _TOKENIZER_FILE).is_file():
        raise InputError(f"model.base: {folder} has no {_TOKENIZER_FILE}.")


def _find_weight_files(folder: Path) -> tuple[str, ...]:
    """The names of the weight files: those that the index lists, or model.safetensors.

    Other files of weights in the folder, such as an adapter's, are no part of the base.
    """
    index = folder / _INDEX_FILE
    if not index.is_file():
        if not (folder / _WEIGHTS_FILE).is_file():
            raise InputError(
                f"model.base: {folder} has neither {_WEIGHTS_FILE} nor {_INDEX_FILE}; other formats are not supported."
            )
        return (_WEIGHTS_FILE,)
    source = f"model.base: {index}"
    content = read_json_object(index, setting="model.base")
    check_values(content, {"weight_map": OBJECT}, source=source, required=["weight_map"])
    names = Kind("the name of a .safetensors file in this folder", _is_weight_file_name)
    check_values(content["weight_map"], dict.fromkeys(content["weight_map"], names), source=f"{source}: weight_map")
    weight_files = tuple(sorted(set(content["weight_map"].values())))
    if not weight_files:
        raise InputError(f"{source}: weight_map is empty.")
    if (folder / _WEIGHTS_FILE).is_file() and _WEIGHTS_FILE not in weight_files:
        raise InputError(
            f"model.base: {folder} has {_WEIGHTS_FILE} and an index of other files; transformers would read the "
            "former. Remove the one that is not meant."
        )
    if missing := [name for name in weight_files if not (folder / name).is_file()]:
        raise InputError(f"model.base: {folder} lacks {missing[0]}; the download may be incomplete. Download it again.")
    return weight_files


def _is_weight_file_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w.-]+\.safetensors", value) is not None


def _check_tokenizer_files(folder: Path) -> set[str]:
    """Check the kinds of what the tokenizer's files hold; returns the tokens that they define."""
    source = f"model.base: {folder / _TOKENIZER_FILE}"
    content = read_json_object(folder / _TOKENIZER_FILE, setting="model.base")
    check_values(content, {"model": OBJECT}, source=source, required=["model"])
    check_values(content["model"], {"vocab": OBJECT}, source=f"{source}: model", required=["vocab"])
    vocab, token_id = content["model"]["vocab"], integer(0, 2**31 - 1)
    check_values(vocab, dict.fromkeys(vocab, token_id), source=f"{source}: model.vocab")
    added = Kind("a list of objects", lambda value: isinstance(value, list) and all(map(OBJECT.matches, value)))
    check_values(content, {"added_tokens": nullable(added)}, source=source)
    token = {"id": token_id, "content": TEXT}
    for item in content.get("added_tokens") or []:
        check_values(item, token, source=f"{source}: added_tokens", required=token)
    return {*vocab, *(item["content"] for item in content.get("added_tokens") or []), *_configured_tokens(folder)}


def _configured_tokens(folder: Path) -> set[str]:
    """Check the kinds of what tokenizer_config.json holds; returns the tokens that it adds to the vocabulary."""
    file = folder / _TOKENIZER_CONFIG_FILE
    if not file.is_file():
        return set()
    source = f"model.base: {file}"
    config = read_json_object(file, setting="model.base")
    token = Kind("a text or an object", lambda value: isinstance(value, str | dict))
    kinds = {
        "eos_token": nullable(token),
        "tokenizer_class": nullable(TEXT),
        "model_max_length": nullable(number(1, 1e300)),  # 1e30 where there is none
        "added_tokens_decoder": nullable(OBJECT),
        "fast_tokenizer_files": Kind(f"null, so that {_TOKENIZER_FILE} is read", lambda value: value is None),
    }
    check_values(config, kinds, source=source)
    added = config.get("added_tokens_decoder") or {}
    check_values(added, dict.fromkeys(added, OBJECT), source=f"{source}: added_tokens_decoder")
    return {str(item.get("content")) for item in added.values()}
