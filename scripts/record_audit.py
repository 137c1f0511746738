"""Record audit: plant wrong and repeated records among the packaged claims, and see how many of them it ranks first.

    600 claims  ->  40 responses that belong to other prompts, 40 near duplicates  ->  fit  ->  audit --what records
    audit_records.jsonl, the planted lines  ->  precision and recall at 40 of each finding, beside chance

    python scripts/record_audit.py                                   # the figures of lit_phi2/audit/README.md
    python scripts/record_audit.py --records 120 --planted 12        # faster

A near duplicate has two words of the response and one of the prompt changed. At as many findings as were planted,
precision is recall. A ranking by chance has as many as the share of the planted records.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

from lit_phi2.cli.main import main as run_cli
from lit_phi2.data.sources import CLAIMS_DIR
from lit_phi2.utils.files import read_json_lines

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "tiny.yaml"
SWAP_FINDINGS, DUPLICATE_FINDINGS = ("label_error", "unsupported_identifier"), ("near_duplicate",)

Rows = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=600, help="packaged claims, of which some are swapped")
    parser.add_argument("--planted", type=int, default=40, help="of each kind")
    parser.add_argument("--same_group", action="store_true", help="swap only inside a form and category")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        rows = list(read_json_lines(CLAIMS_DIR / "train.jsonl"))[: args.records]
        rows, swapped, copied = plant(rows, args.planted, random.Random(args.seed), same_group=args.same_group)
        Path("records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        findings = audit(args.epochs)
    print(f"{len(rows)} records; chance {args.planted / len(rows):.2f}")
    for kinds, planted in ((SWAP_FINDINGS, swapped), (DUPLICATE_FINDINGS, copied)):
        for kind in kinds:
            print(f"{kind:<24} {precision_at(findings, kind, planted):.3f} of the first {args.planted}")


def plant(
    rows: Rows, count: int, generator: random.Random, *, same_group: bool = False
) -> tuple[Rows, set[int], set[int]]:
    """The rows with planted ones, and the lines of the swapped rows and of the near duplicates.

    Args:
        rows: of JSON Lines.
        count: rows of each kind.
        generator: chooses them.
        same_group: whether a row gets the response of one of its form and category.
    """
    rows = [dict(row) for row in rows]
    order = generator.sample(range(len(rows)), len(rows))
    if same_group:
        order.sort(key=lambda index: (rows[index]["form"], rows[index]["category"]))
    swapped, copied = set(order[:count]), order[count : 2 * count]
    chosen = order[:count]
    responses = [rows[index]["response"] for index in chosen]
    for place, index in enumerate(chosen):
        rows[index]["response"] = responses[(place + 1) % count]
    for index in copied:
        row = rows[index]
        texts = {name: _changed(row[name], words, generator) for name, words in (("instruction", 1), ("response", 2))}
        rows.append(row | {"id": f"copy-{index}", **texts})
    return rows, {index + 1 for index in swapped}, set(range(len(rows) - count + 1, len(rows) + 1))


def audit(epochs: int) -> Rows:
    """The findings about records.jsonl of the current folder, after training on it."""
    settings = ["--config", str(CONFIG), "--data.train_files=records.jsonl", "--data.val_files=claims:validation[:8]"]
    settings += ["--model.dtype=float32", "--model.max_new_tokens=8", "--trainer.enable_progress_bar=false"]
    fit = [f"--trainer.max_epochs={epochs}", "--trainer.num_sanity_val_steps=0"]
    for command in (["fit", *settings, *fit], ["audit", *settings, "--ckpt_path=last", "--what=records"]):
        if code := run_cli(command):
            raise SystemExit(code)
    return list(read_json_lines(next(Path("runs").rglob("audit_records.jsonl"))))


def precision_at(findings: Sequence[Mapping[str, Any]], kind: str, planted: set[int]) -> float:
    """The fraction of the first findings of a kind, as many as were planted, that are planted records.

    >>> findings = [{"kind": "a", "location": f"r.jsonl:{line}"} for line in (7, 2, 9)]
    >>> precision_at(findings, "a", {7, 9})
    0.5
    """
    first = [finding for finding in findings if finding["kind"] == kind][: len(planted)]
    lines = {int(finding["location"].rpartition(":")[2]) for finding in first}
    return len(lines & planted) / len(planted)


def _changed(text: str, count: int, generator: random.Random) -> str:
    """The text with some words replaced."""
    words = text.split(" ")
    for place in generator.sample(range(len(words)), count):
        words[place] = "otherwise"
    return " ".join(words)


if __name__ == "__main__":
    main()
