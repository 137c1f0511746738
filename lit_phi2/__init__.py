"""lit_phi2: fine-tune Microsoft's Phi-2 with LoRA on insurance instruction/response records.

The flow, which is also the order in which to read the rooms:

    line of a file -> Record     data/records.py   read and checked; every fault as path:line
    Record -> prompt             data/prompts.py   the one template, for fit, samples and predict
    prompt -> Example            data/encode.py    token ids and labels
    Examples -> Plan             data/plan.py      which examples share a row, a batch, an optimizer step
    Example -> Row -> Batch      data/collate.py   tensors
    Batch -> hidden states       model/phi2.py     Phi-2 with a fused Wqkv, adapted by model/lora.py
    hidden states -> loss        model/loss.py     summed nats over supervised tokens
    loss -> curves, adapter      model/module.py   the LightningModule; callbacks/ write what is kept
    prompt -> answer             generation.py     greedy decoding

Nothing is sent anywhere: the only download is the base or the dataset that a config names.
"""

import os

__version__ = "0.1.0"

# Before any library reads them. The records are private, so the hub client reports nothing about its use.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DISABLE_TELEMETRY", "1")
