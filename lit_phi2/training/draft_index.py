"""Draft index: the n-grams of the training responses, in the folder of a run.

    fit       examples of train     -> drafts.npz, before the first step
    predict   drafts.npz            -> what drafts are looked up in (`generation/drafts.py`)
              none, or a broken one -> built again from train_files, and not written

The file holds the text of training responses as token ids, so it stays in the run's folder: nothing exports it. It
decides how fast completions come and never what they say, so a missing or broken one is no error.
"""

import logging
from collections.abc import Iterable
from pathlib import Path

from lit_phi2.data.encode import encode
from lit_phi2.errors import InputError
from lit_phi2.generation.ngrams import NgramIndex, build_index
from lit_phi2.pretrained import load_tokenizer, resolve_base_model
from lit_phi2.training.protocols import TrainingData
from lit_phi2.types import Example

log = logging.getLogger(__name__)

INDEX_FILE = "drafts.npz"


def write_draft_index(run_dir: Path, examples: Iterable[Example]) -> NgramIndex:
    """Build the index of a run and keep it in its folder."""
    index = build_index(examples)
    index.save(run_dir / INDEX_FILE)
    return index


def find_draft_index(run_dir: Path, data: TrainingData) -> NgramIndex | None:
    """The index of the run in a folder; None where there is no run, or its records are gone.

    Args:
        run_dir: that a checkpoint belongs to.
        data: whose train_files are read if the run has no index.
    """
    if not (run_dir / "config.yaml").is_file():  # an exported adapter
        return None
    index = NgramIndex.load(run_dir / INDEX_FILE)
    if index is not None:
        return index
    try:
        records = data.training_records()
    except InputError as error:
        log.info("no drafts from training responses: %s", error)
        return None
    log.info("drafts: %s has no %s; the training responses are read again", run_dir, INDEX_FILE)
    tokenizer = load_tokenizer(resolve_base_model(data.base))
    return build_index(encode(records, tokenizer, max_length=data.max_length, on_overlong="skip").examples)
