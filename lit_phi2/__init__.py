"""lit_phi2: fine-tune Microsoft's Phi-2 with LoRA on insurance instruction/response records.

    line of a file -> Record -> prompt -> Example (ids, labels) -> Row -> Batch -> hidden states
      -> (nats, tokens) -> loss -> curves, checkpoint, adapter -> completions, metrics

The README.md beside this file lists the module for each step, in the order in which to read them.

Nothing is sent anywhere: the only download is the base or the dataset that a config names.
"""

import os

__version__ = "0.1.0"

# Set before any library reads them. The records are private, so the hub client reports nothing about its use.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DISABLE_TELEMETRY", "1")
