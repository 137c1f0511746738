"""Checks: the files of an export are read back, and the export is run in its runtime where that is installed.

peft, merged         peft, transformers; always installed
gguf, gguf-merged    llama.cpp, by the package xllamacpp
mlx                  mlx-lm
"""

import tempfile
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lit_phi2.adapters.adapter import Adapter
from lit_phi2.base_config import CONFIG_FILE
from lit_phi2.data.encode import tokenize
from lit_phi2.errors import InputError
from lit_phi2.export.commands import gguf_model_file
from lit_phi2.export.gguf import write_gguf_model
from lit_phi2.export.llama_cpp import LlamaCppError
from lit_phi2.export.merged import write_merged
from lit_phi2.export.mlx import BASE_COPY
from lit_phi2.export.parity import Parity, Reference, Runtime, check_parity, coarsest, compare
from lit_phi2.export.read_back import read_back
from lit_phi2.export.runtimes import (
    LlamaCppRuntime,
    is_installed,
    llama_cpp_runtime,
    mlx_runtime,
    peft_runtime,
    transformers_runtime,
)
from lit_phi2.export.weights import ModelWeights
from lit_phi2.original_code import is_original_config
from lit_phi2.utils.json_objects import read_json_object
from lit_phi2.utils.paths import GGUF_ADAPTER_FILE

_OPTIONAL_PACKAGES = {"gguf": "xllamacpp", "gguf-merged": "xllamacpp", "mlx": "mlx_lm"}


@dataclass(frozen=True, slots=True)
class Check:
    """What was checked.

    Attributes:
        method: runtime, read back or none.
        summary: in words, for the log and the card.
        parity: the figures, if the method is runtime.
    """

    method: str
    summary: str
    parity: Parity | None = None


@dataclass(frozen=True, slots=True)
class Exported:
    """An export on disk, and what it was made from.

    Attributes:
        folder: of the export, before it has its final name.
        format: peft, merged, gguf, gguf-merged or mlx.
        dtype: of the export.
        adapter: None for the base alone.
        base: without the adapter.
        weights: with the adapter merged.
        tokenizer: of the base.
    """

    folder: Path
    format: str
    dtype: str
    adapter: Adapter | None
    base: ModelWeights
    weights: ModelWeights
    tokenizer: PreTrainedTokenizerBase


def check_exported(exported: Exported, reference: Reference | None) -> Check:
    """Read an export back, and run it.

    Args:
        exported: the export.
        reference: what the running model says; None checks nothing.

    Raises:
        InputError: the export is not what was exported.
    """
    if reference is None:
        return Check("none", "not checked: --check 0")
    files = read_back(
        exported.folder,
        format=exported.format,
        dtype=exported.dtype,
        adapter=exported.adapter,
        weights=exported.weights,
    )
    package = _OPTIONAL_PACKAGES.get(exported.format)
    if package is not None and not is_installed(package):
        return Check("read back", f"not run, because {package} is not installed here; {files}")
    with ExitStack() as stack:
        try:
            runtime = stack.enter_context(_runtime(stack, exported, reference))
            parity = compare(reference, runtime)
            if exported.format == "gguf-merged":
                _check_tokenizer(runtime, exported.tokenizer, reference)
        except LlamaCppError as error:
            raise InputError(f"export: refused, because llama.cpp does not run the result. {error}") from error
    saved = str(exported.base.saved_dtype).removeprefix("torch.")  # in which mlx-lm runs the base
    check_parity(parity, coarsest(exported.dtype, reference.dtype, saved if exported.format == "mlx" else "float32"))
    return Check("runtime", f"{parity.summary()}; {files}", parity)


def _runtime(stack: ExitStack, exported: Exported, reference: Reference) -> AbstractContextManager[Runtime]:
    folder, base_folder = exported.folder, exported.base.base.folder
    if exported.format == "peft":
        if is_original_config(read_json_object(base_folder / CONFIG_FILE)):  # transformers does not know its names
            base_folder = _temporary_folder(stack, folder)
            write_merged(exported.base, exported.tokenizer, base_folder, dtype=None)
        return peft_runtime(base_folder, folder, reference)
    if exported.format == "merged":
        return transformers_runtime(folder, exported.dtype, reference)
    if exported.format == "gguf-merged":
        return llama_cpp_runtime(folder / gguf_model_file(exported.dtype), None, reference)
    if exported.format == "mlx":
        copy = folder / BASE_COPY
        return mlx_runtime(copy if copy.is_dir() else base_folder, folder, reference)
    # The adapter's base as GGUF, on the disk of the export, for as long as the check takes.
    temporary = _temporary_folder(stack, folder)
    write_gguf_model(exported.base, exported.tokenizer, temporary / "base.gguf", reference.dtype)
    return llama_cpp_runtime(temporary / "base.gguf", folder / GGUF_ADAPTER_FILE, reference)


def _temporary_folder(stack: ExitStack, folder: Path) -> Path:
    """A folder that is removed with the stack; inside the export's, which the next export removes after a kill."""
    return Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder, prefix="base-")))


def _check_tokenizer(runtime: Runtime, tokenizer: PreTrainedTokenizerBase, reference: Reference) -> None:
    """Compare llama.cpp's tokens of the prompts with those of the base's tokenizer."""
    assert isinstance(runtime, LlamaCppRuntime)
    for prompt in reference.prompts:
        text = str(tokenizer.decode(prompt, clean_up_tokenization_spaces=False))
        if runtime.process.tokenize(text) != tokenize(tokenizer, [text])[0]:
            raise InputError(
                "export: refused, because llama.cpp reads other tokens than the base's tokenizer from a prompt. "
                "Nothing was written. Use --format merged."
            )
