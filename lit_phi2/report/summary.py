"""Summary: the figures of a run -> a few plain sentences at the top of its page.

    Curves, metrics, audits   ->   "Validation loss fell from 0.452 (the base) to 0.392 at step 60, its lowest."

A sentence says what was measured and, where figures allow it, what follows; what was not measured is left out.
"""

from collections.abc import Iterator, Mapping

from lit_phi2.evaluation.metrics import Interval
from lit_phi2.report.audits import KindCount, LeakageAudit
from lit_phi2.report.curves import Curve, Curves
from lit_phi2.report.ledger_counts import SplitCounts

_COMPARED = ("fact recall", "chrF", "ROUGE-L")  # the first that was measured is in the summary


def training_sentences(curves: Curves, counts: Mapping[str, SplitCounts]) -> Iterator[str]:
    """What was trained, and what became of the loss."""
    train, val = curves.get("train/loss"), curves.get("val/loss")
    if train is not None:
        records = f" on {plural(counts['train'].num_used, 'record')}" if "train" in counts else ""
        yield f"Training took {plural(int(train.steps[-1]), 'optimizer step')}{records}."
    if val is not None:
        yield _describe_loss(val)
    left_out = sum(sum(split.left_out.values()) for split in counts.values())
    if left_out:
        yield f"{plural(left_out, 'record')} could not be used."


def _describe_loss(val: Curve) -> str:
    first, lowest, last = val.values[0], val.values[val.lowest], val.values[-1]
    step = f"{val.steps[val.lowest]:,}"
    start = f"{first:.3f} (the base)" if val.steps[0] == 0 else f"{first:.3f} at step {val.steps[0]:,}"
    if len(val) == 1:
        return f"Validation loss is {start}."
    if val.lowest == 0:
        return f"Validation loss did not fall below {start}: training did not help."
    if val.lowest == len(val) - 1:
        return f"Validation loss fell from {start} to {lowest:.3f} at step {step}, the end of training."
    after = f"and was {last:.3f} at step {val.steps[-1]:,}"
    sign = ", a sign of overfitting" if last > lowest + 0.1 * (first - lowest) else ""
    return f"Validation loss fell from {start} to {lowest:.3f} at step {step} {after}{sign}."


def test_sentences(columns: Mapping[str, Mapping[str, Interval]]) -> Iterator[str]:
    """How the completions compare with those of the base and with what no model is needed for."""
    if not columns:
        return
    system, rows = next(iter(columns.items()))
    metric = next((name for name in _COMPARED if name in rows), None)
    if metric is None:
        return
    ours = rows[metric]
    subject = f"On {plural(ours.records, 'test record')} the {system} reaches {metric} {format_interval(ours)}"
    others = [
        f"{_NAMES.get(name, name)} {other[metric].mean:.3f}" for name, other in columns.items() if metric in other
    ][1:]
    yield f"{subject}; {', '.join(others)}." if others else f"{subject}."
    base = columns.get("base", {}).get(metric)
    if system == "adapter" and base is not None:
        if ours.low > base.high:
            yield "The adapter is better than the base beyond what the choice of records explains."
        elif ours.high < base.low:
            yield "The adapter is worse than the base beyond what the choice of records explains."
        else:
            yield "The intervals of adapter and base overlap: this test does not tell them apart."
    if "unsupported identifiers" in rows:
        yield f"{rows['unsupported identifiers'].mean:.1%} of its completions have an identifier that nothing supports."


_NAMES = {"base": "the base", "copy_prompt": "copying the prompt", "nearest": "the nearest training record"}


def audit_sentences(leakage: LeakageAudit | None, records: Mapping[str, KindCount] | None) -> Iterator[str]:
    """The verdicts."""
    if leakage is not None and leakage.passed is not None:
        figure = f": AUC {leakage.auc}" if leakage.auc else ""
        yield f"The leakage audit {'passed' if leakage.passed else 'FAILED'}{figure}."
    if records is not None:
        yield f"The record audit lists {plural(sum(kind.count for kind in records.values()), 'finding')} to look at."


def plural(count: int, noun: str) -> str:
    """
    >>> plural(1, "record"), plural(1200, "record")
    ('1 record', '1,200 records')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def format_interval(interval: Interval) -> str:
    """
    >>> format_interval(Interval(0.5, 0.25, 0.75, 8))
    '0.500 [0.250, 0.750]'
    """
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
