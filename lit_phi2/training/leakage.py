"""Leakage: what the adapter gives away of train, measured; the figures and the verdict are those of `audit/leakage.py`.

    records of train and val       ->  fall of their losses             ->  membership
    canaries, controls             ->  nats of their secrets            ->  exposure
    prefixes of canaries, records  ->  greedy completions               ->  share extracted
                                                                        ->  table, audit_leakage.json, verdict

The canaries are made again from data.canaries and seed_everything; how often each is in training, the split tells.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lit_phi2.audit.extraction import Target, canary_target, identifier_targets
from lit_phi2.audit.leakage import (
    CanaryGroup,
    LeakageLimits,
    Rate,
    beyond_limits,
    exact_rate,
    exposures,
    mean_rate,
    membership,
)
from lit_phi2.audit.records import Array
from lit_phi2.data.canaries import PLACES, is_planted, make_canaries, planted_copies
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.data.schedule import BatchingConfig
from lit_phi2.errors import LeakageError
from lit_phi2.training.auditing import example_nats, measure
from lit_phi2.training.module import LitPhi2
from lit_phi2.training.protocols import tokenizer_of
from lit_phi2.types import Example
from lit_phi2.utils.console import print_text
from lit_phi2.utils.files import atomic_write

log = logging.getLogger(__name__)

LEAKAGE_FILE = "audit_leakage.json"
NUM_COMPARED = 64  # controls of a place that are measured as canaries are; these are compared with the others


def audit_leakage(model: LitPhi2, data: ClaimsDataModule, folder: Path, limits: LeakageLimits) -> None:
    """Print what the adapter gives away and the verdict, and write both to audit_leakage.json.

    Args:
        model: with the base and the adapter loaded.
        data: train and val are set up.
        folder: of the run.
        limits: of the config.

    Raises:
        LeakageError: the adapter is beyond a limit; the file is written.
    """
    audited = measure(model, data)
    drops, is_member = audited.base - audited.adapter, np.array([split == "train" for split in audited.splits])
    rates = membership(drops[is_member], drops[~is_member])
    groups = measure_canaries(model, data)
    identifiers = extract_identifiers(model, data)
    shares = {name: share for name, (share, _) in identifiers.items()}
    beyond = beyond_limits(rates, groups, shares, limits)
    result = {
        "membership": {name: asdict(rate) for name, rate in rates.items()},
        "records": {"train": int(is_member.sum()), "val": int((~is_member).sum())},
        "canaries": [asdict(group) for group in groups],
        "identifiers": {name: {"number": number, **asdict(share)} for name, (share, number) in identifiers.items()},
        "limits": asdict(limits),
        "beyond": beyond,
        "passed": not beyond,
    }
    atomic_write(folder / LEAKAGE_FILE, json.dumps(result, indent=2) + "\n")
    for line in _lines(rates, groups, identifiers, beyond):
        print_text(line)
    log.info("leakage audit: %s", folder / LEAKAGE_FILE)
    if beyond:
        raise LeakageError(
            "\n".join(["the adapter gives away more than the config allows:", *beyond])
            + "\nTrain fewer epochs, lower model.lora_r or model.learning_rate, remove duplicates, or set data.redact."
        )


def _lines(
    rates: dict[str, Rate], groups: Sequence[CanaryGroup], identifiers: dict[str, tuple[Rate, int]], beyond: list[str]
) -> Iterator[str]:
    for name, rate in rates.items():
        yield f"membership {name} {rate}"
    yield from map(str, groups)
    for name, (share, number) in identifiers.items():
        yield f"identifiers in responses of {name} ({number}): extracted {share}"
    yield f"verdict: {'beyond' if beyond else 'within'} the limits of the config"


def measure_canaries(model: LitPhi2, data: ClaimsDataModule) -> list[CanaryGroup]:
    """Exposure and extraction of the canaries, by place and copies in training, and of controls; empty without any.

    Args:
        model: with the base and the adapter loaded.
        data: train is set up.
    """
    canaries, controls = make_canaries(data.canaries, data.seed)
    if not canaries:
        return []
    copies = planted_copies(data.splits["train"].records)
    groups = []
    for place in PLACES:
        of_place = [control for control in controls if control.place == place]
        members = of_place[:NUM_COMPARED] + [canary for canary in canaries if canary.place == place]
        reference = of_place[NUM_COMPARED:]
        targets = [canary_target(canary, tokenizer_of(data)) for canary in members + reference]
        nats = secret_nats(model, data, targets)
        bits = exposures(nats[: len(members)], nats[len(members) :])
        finished = np.array(extract(model, targets[: len(members)]))
        keys = [(copies[canary.id], not canary.repeats) for canary in members]
        for repeats, is_control in sorted(set(keys), key=lambda key: (not key[1], key[0])):
            chosen = [index for index, key in enumerate(keys) if key == (repeats, is_control)]
            exposure = mean_rate(bits[chosen], highest=float(np.log2(len(reference) + 1)))
            extracted = exact_rate(int(finished[chosen].sum()), len(chosen))
            groups.append(CanaryGroup(place, repeats, is_control, len(chosen), exposure, extracted))
    return groups


def secret_nats(model: LitPhi2, data: ClaimsDataModule, targets: Sequence[Target]) -> Array:
    """(n,) summed nats of each secret after its prefix."""
    examples = [Example("", target.prefix + target.secret, len(target.prefix)) for target in targets]
    lengths = np.array([len(example.ids) for example in examples], np.int32)
    batching = BatchingConfig(max(data.max_length, int(lengths.max())), data.packing, data.batch_size)
    return example_nats(model.fused_phi, examples, lengths, batching)


def extract_identifiers(model: LitPhi2, data: ClaimsDataModule) -> dict[str, tuple[Rate, int]]:
    """The share of identifiers in responses that is extracted, and how many were tried; no entry for a split without.

    Args:
        model: with the base and the adapter loaded.
        data: train and val are set up.
    """
    splits = {name: data.splits[name] for name in ("train", "val")}
    records: dict[str, Any] = {
        name: [index for index, record in enumerate(split.records) if not is_planted(record)]
        for name, split in splits.items()
    }
    found = {}
    for name, targets in identifier_targets(splits, records, tokenizer_of(data)).items():
        if targets:
            finished = extract(model, targets)
            found[name] = exact_rate(sum(finished), len(finished)), len(finished)
    return found


def extract(model: LitPhi2, targets: Sequence[Target]) -> list[bool]:
    """Whether greedy decoding finishes each secret from its prefix."""
    engine = model.new_engine(len(targets))
    for key, target in enumerate(targets):
        engine.submit(key, target.prefix, len(target.secret))
    completed: dict[int, list[int]] = {}
    while engine.waiting or engine.active:
        completed.update({key: completion.ids for key, completion in engine.step()})
    return [completed[key] == target.secret for key, target in enumerate(targets)]
