"""Table: the metrics of several systems side by side, for the terminal, for JSON and for TensorBoard's names.

    {"adapter": {"fact recall": Interval, ...}, "base": {...}, "copy_prompt": {...}, "nearest": {...}}

    | metric      | adapter              |  base | copy_prompt | nearest | records |
    |-------------|----------------------|-------|-------------|---------|---------|
    | fact recall | 0.779 [0.744, 0.811] | 0.045 |       0.471 |   0.276 |     436 |

A metric's name may contain text of a record (a form, a category, a kind of fact). In a plain string, rich would read
square brackets as markup and drop some control characters; names are therefore escaped and wrapped in `Text`.
"""

import re
import sys
from dataclasses import asdict
from io import StringIO

from lit_phi2.evaluation.metrics import Interval
from lit_phi2.utils.console import escape_control_chars

_GROUP_ROW = re.compile(r"(form|category) .*: (chrF|empty|echo|unsupported \w+)\Z", re.DOTALL)

Table = dict[str, dict[str, Interval]]  # system -> metric -> interval


def without_groups(columns: Table) -> Table:
    """The table without the rows that repeat a metric for one form or category; `test_metrics.json` has them."""
    return {
        name: {metric: interval for metric, interval in rows.items() if not _GROUP_ROW.match(metric)}
        for name, rows in columns.items()
    }


def format_table(columns: Table) -> str:
    """A row for each metric, a column for each system; the first system with its interval, the others with the mean.

    Plain ASCII but for the names, so that every terminal can show it; it is Markdown too.

    >>> rows = {"fact recall": Interval(0.5, 0.25, 0.75, 8)}
    >>> print(format_table({"adapter": rows, "base": rows}))
    | metric      | adapter              |  base | records |
    |-------------|----------------------|-------|---------|
    | fact recall | 0.500 [0.250, 0.750] | 0.500 |       8 |
    """
    from rich import box  # only `test` needs rich
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    first, *others = columns
    table = RichTable(box=box.MARKDOWN)
    for name in ("metric", first):
        table.add_column(Text(name), no_wrap=True)
    for name in (*others, "records"):
        table.add_column(Text(name), no_wrap=True, justify="right")
    for metric in dict.fromkeys(metric for rows in columns.values() for metric in rows):
        cells = [columns[name].get(metric) for name in columns]
        num_records = next(cell.records for cell in cells if cell is not None)
        texts = [metric, _format_interval(cells[0]), *map(_format_mean, cells[1:]), str(num_records)]
        table.add_row(*(Text(escape_control_chars(" ".join(text.split()))) for text in texts))
    # Never in color or as HTML, whatever the environment asks of rich; wide, because rich shortens what does not fit.
    console = Console(file=StringIO(), width=sys.maxsize, color_system=None, force_terminal=False, force_jupyter=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line for line in capture.get().splitlines() if line.strip())  # the box has blank edges


def to_dict(columns: Table) -> dict[str, dict[str, dict[str, float]]]:
    """The table as plain values, for JSON."""
    return {name: {metric: asdict(interval) for metric, interval in rows.items()} for name, rows in columns.items()}


def metric_name(metric: str) -> str:
    """The key under which a metric is logged.

    >>> metric_name("form explain"), metric_name("ROUGE-L"), metric_name("length ratio")
    ('test/form_explain', 'test/rouge_l', 'test/length_ratio')
    """
    return "test/" + re.sub(r"\W+", "_", metric.lower())


def _format_interval(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _format_mean(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.mean:.3f}"
