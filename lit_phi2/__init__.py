"""lit_phi2: fine-tune Microsoft's Phi-2 with LoRA on insurance instruction/response records.

    line of a file -> Record -> prompt -> Example (ids, labels) -> Row -> Batch -> hidden states
      -> (nats, tokens) -> loss -> curves, checkpoint, adapter -> completions, metrics

The README.md beside this file lists the module for each step, in the order in which to read them.

Nothing is sent anywhere: the only download is the base or the dataset that a config names.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_phi2.data.datamodule import ClaimsDataModule
    from lit_phi2.training.module import LitPhi2
    from lit_phi2.training.trainer import Trainer

__all__ = ["ClaimsDataModule", "LitPhi2", "Trainer"]
__version__ = "0.1.0"

# Set before any library reads them. The records are private, so the hub client reports nothing about its use.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DISABLE_TELEMETRY", "1")

_MODULES = {
    "ClaimsDataModule": "lit_phi2.data.datamodule",
    "LitPhi2": "lit_phi2.training.module",
    "Trainer": "lit_phi2.training.trainer",
}


def __getattr__(name: str) -> Any:
    """Import a class when it is asked for: torch and Lightning take seconds, and the version needs neither."""
    if name not in _MODULES:
        raise AttributeError(f"module 'lit_phi2' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
