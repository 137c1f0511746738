"""lit_phi2: fine-tune Microsoft's Phi-2 with LoRA on insurance instruction/response records.

The flow, which is also the order in which to read the rooms:

    errors, files                errors.py, files.py    faults and their exit codes; files that survive a kill
    what a terminal shows        terminal.py            our own lines, with control characters as numbers
    name of a base -> folder     base.py                downloaded once, or yours; its tokenizer and identity
    the values that travel       batch.py               Example, Row, Batch; the legend of axes
    device -> compute dtype      devices.py             and why

    line of a file -> Record     data/records.py        read and checked; every fault as path:line
    Record -> prompt             data/prompts.py        the one template, for fit, samples and predict
    prompt -> Example            data/encode.py         token ids and labels
    Examples -> plan             data/plan.py           which examples share a row, a batch, an optimizer step
    Examples kept                data/store.py          in memory; of large files on disk, made once
    Example -> Row -> Batch      data/collate.py        tensors; data/datamodule.py arranges, data/report.py inspects

    products of Phi-2            model/products.py      with frozen weights, on any CPU
    between its products         model/attention.py     and model/elementwise.py: in few passes over memory
    Batch -> hidden states       model/phi2.py          Phi-2 with a fused Wqkv, adapted by model/lora.py
    hidden states -> loss        model/loss.py          summed nats over supervised tokens
    prompt -> answer             generation.py          greedy decoding
    loss -> optimizer step       model/module.py        the LightningModule; loops.py: validations where a step ends
    what is shown and kept       callbacks/             samples, predictions, test answers, checkpoints, throughput
    answers -> figures           quality.py             fact recall and more, beside baselines such as nearest.py

    a run on disk                runs.py                folders, and which checkpoint a name means
    subcommands                  trainer.py, cli.py     where data and model meet

Imports point upwards in this list only. `data/` and `model/` do not know each other.

Nothing is sent anywhere: the only download is the base or the dataset that a config names.
"""

import os

__version__ = "0.1.0"

# Before any library reads them. The records are private, so the hub client reports nothing about its use.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DISABLE_TELEMETRY", "1")
