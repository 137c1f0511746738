"""Pretrained: from the name of a base in a config to its folder on disk, its tokenizer and its fingerprint.

    tiny             the packaged tiny Phi
    a folder         any Phi in Hugging Face form: config.json, *.safetensors, tokenizer.json
    owner/name       on the hub, downloaded once into the hub's own cache; the only download of a run

Only safetensors are read, and code that comes with a model is never run.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lit_phi2.errors import InputError

TINY_PHI_DIR = Path(__file__).parent / "assets" / "tiny-phi"
_HUB_FILES = ["*.json", "*.safetensors", "merges.txt", "vocab.json"]
_INDEX_FILE = "model.safetensors.index.json"

_HOW_TO_GET_PHI2 = (
    "For the real Phi-2 (5.6 GB, MIT licence) run\n"
    "    hf download microsoft/phi-2\n"
    "once on a machine with network, or give the folder of a copy: --model.base /path/to/phi-2. "
    "--model.base tiny is packaged and needs neither."
)


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base on disk.

    Attributes:
        name: as the config gives it, a folder made absolute; enough to load it again.
        folder: where its files are.
        revision: the commit on the hub; empty for a folder.
        digest: of its config, weight index and a sample of its weights; distinguishes two bases without reading
            gigabytes.
    """

    name: str
    folder: Path
    revision: str
    digest: str

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
    elif Path(name).expanduser().is_dir():
        folder, revision = Path(name).expanduser().resolve(), ""
        name = str(folder)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        folder = _download(name)
        revision = folder.name
    else:
        raise InputError(
            f"model.base: {name!r} is neither a folder nor a hub id (owner/name) nor 'tiny'.\n{_HOW_TO_GET_PHI2}"
        )
    _check_is_phi(name, folder)
    return BaseModel(name, folder, revision, _digest(folder))


def load_tokenizer(base: BaseModel) -> PreTrainedTokenizerBase:
    """Load the base's tokenizer.

    Raises:
        InputError: it has no EOS token, so the model could not learn to stop.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base.folder, local_files_only=True)
    if tokenizer.eos_token_id is None:
        raise InputError(f"model.base: the tokenizer in {base.folder} has no EOS token (eos_token).")
    return tokenizer


def read_model_config(base: BaseModel) -> dict[str, Any]:
    """Read the base's config.json."""
    config: dict[str, Any] = json.loads((base.folder / "config.json").read_text("utf-8"))
    return config


def _download(name: str) -> Path:
    # Imported here, so that a run on a local base never loads the hub client.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES, local_files_only=True))
    except LocalEntryNotFoundError:
        pass  # not in the cache
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"model.base: {name!r} is not on this machine and could not be downloaded "
            f"({type(error).__name__}).\n{_HOW_TO_GET_PHI2}"
        ) from error


def _check_is_phi(name: str, folder: Path) -> None:
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise InputError(
            f"model.base: {folder} has no config.json, so it is not a model in Hugging Face form.\n{_HOW_TO_GET_PHI2}"
        )
    try:
        model_type = json.loads(config_file.read_text("utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise InputError(f"model.base: {config_file} is not a JSON object: {error}") from error
    if model_type != "phi":
        raise InputError(f"model.base: {name!r} is a {model_type!r} model; expected 'phi', as Phi-2 is.")
    if not list(folder.glob("*.safetensors")):
        raise InputError(f"model.base: {folder} has no *.safetensors file; other formats are not supported.")
    index = folder / _INDEX_FILE
    shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values()) if index.is_file() else set()
    if missing := sorted(shard for shard in shards if not (folder / shard).is_file()):
        raise InputError(f"model.base: {folder} lacks {missing[0]}; the download may be incomplete. Download it again.")
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"model.base: {folder} has no tokenizer.json.")


def _digest(folder: Path) -> str:
    """SHA-256 of the config, the weight index, and the size and the middle 1 MiB of each weight file."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    index = folder / _INDEX_FILE
    if index.is_file():
        digest.update(index.read_bytes())
    for weights in sorted(folder.glob("*.safetensors")):
        size = weights.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with weights.open("rb") as file:
            file.seek(size // 2)
            digest.update(file.read(1 << 20))
    return digest.hexdigest()[:16]
