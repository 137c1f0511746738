"""Check with memaudit: the membership figures of a leakage audit beside those of memaudit, on the same scores.

    fit, audit --what leakage  ->  scores of train and val  ->  lit_phi2: AUC, true positives at 1 %, intervals
                                                            ->  memaudit: the same

    python -m venv /tmp/memaudit && /tmp/memaudit/bin/pip install memaudit==0.2.0      # an environment of its own
    python scripts/memaudit_check.py --memaudit /tmp/memaudit/bin/python

memaudit may open no connection here. It counts the members at or above the 99 % quantile of the others, lit_phi2 those
above the score that at most 1 % of the others exceed.
"""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

from lit_phi2.audit.leakage import Rate, exact_rate
from lit_phi2.cli.main import main as run_cli
from lit_phi2.training import leakage

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "tiny.yaml"
PASSED, BEYOND_LIMITS = 0, 3  # exit codes of an audit
PROGRAM = """
import json, socket, sys

def refuse(*args):
    raise OSError("a connection")

socket.socket.connect = refuse
from memaudit.stats import clopper_pearson, roc_auc, tpr_at_fpr

given = json.load(sys.stdin)
found = tpr_at_fpr(given["members"], given["others"], 0.01)
json.dump({
    "auc": roc_auc(given["members"], given["others"]),
    "detected": found["n_detected"], "threshold": found["threshold"], "interval": [found["ci_low"], found["ci_high"]],
    "interval_of_ours": clopper_pearson(given["detected"], len(given["members"])),
}, sys.stdout)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memaudit", required=True, help="Python of an environment with memaudit 0.2.0")
    parser.add_argument("--records", type=int, default=200, help="packaged claims of train, and at most of val")
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        scores, ours = audited_scores(args.records, args.epochs)
    auc, rate = (Rate(**ours[name]) for name in ("auc", "tpr_at_1_percent_fpr"))
    num_members = len(scores["members"])
    detected = round(rate.value * num_members)
    given = json.dumps({**scores, "detected": detected})
    answer = subprocess.run(
        [args.memaudit, "-I", "-c", PROGRAM], input=given, capture_output=True, text=True, check=True
    )
    theirs = json.loads(answer.stdout)
    print(f"{num_members} records of train, {len(scores['others'])} of val, {args.epochs} epochs")
    print(f"AUC: lit_phi2 {auc.value!r}, memaudit {theirs['auc']!r}; interval of lit_phi2 {auc}")
    low, high = theirs["interval_of_ours"]
    print(f"true positives at 1 %: lit_phi2 {detected}, {rate}; memaudit's interval of as many [{low:.3f}, {high:.3f}]")
    here, (low, high) = exact_rate(theirs["detected"], num_members), theirs["interval"]
    print(f"memaudit's own: {theirs['detected']}, {here} here, [{low:.3f}, {high:.3f}] there")


def audited_scores(records: int, epochs: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """The score of each record that the leakage audit of a new run compares, and the membership that it reports."""
    scores: dict[str, list[float]] = {}

    def kept(members: Sequence[float], others: Sequence[float]) -> dict[str, Rate]:
        scores.update(members=[float(value) for value in members], others=[float(value) for value in others])
        found: dict[str, Rate] = membership(members, others)
        return found

    membership: Any = leakage.membership
    leakage.membership = kept  # type: ignore[assignment]  # audit_leakage.json has no score of a record
    splits = [
        f"--data.{split}_files=claims:{name}[:{records}]" for split, name in (("train", "train"), ("val", "validation"))
    ]
    settings = ["--config", str(CONFIG), *splits, "--trainer.enable_progress_bar=false"]
    fit = [f"--trainer.max_epochs={epochs}", "--trainer.num_sanity_val_steps=0", "--trainer.limit_val_batches=0"]
    for command, allowed in (
        (["fit", *settings, *fit], (PASSED,)),
        (["audit", *settings, "--ckpt_path=last", "--what=leakage"], (PASSED, BEYOND_LIMITS)),
    ):
        if (code := run_cli(command)) not in allowed:
            raise SystemExit(code)
    audit = json.loads(next(Path("runs").rglob("audit_leakage.json")).read_text("utf-8"))
    return scores, audit["membership"]


if __name__ == "__main__":
    main()
