"""evaluation/table.py."""

import re
from dataclasses import asdict

from lit_phi2.evaluation.metrics import Table


def metric_name(figure: str) -> str:
    """As it is logged.

    >>> metric_name("form explain"), metric_name("ROUGE-L"), metric_name("length ratio")
    ('test/form_explain', 'test/rouge_l', 'test/length_ratio')
    """
    return "test/" + re.sub(r"\W+", "_", figure.lower())


def to_dict(columns: Table) -> dict[str, dict[str, dict[str, float]]]:
    """For JSON."""
    return {name: {figure: asdict(interval) for figure, interval in rows.items()} for name, rows in columns.items()}


def format_table(columns: Table) -> str:
    """Figures as text: a row a figure, a column an answerer; the first one's interval beside it.

    >>> rows = {"fact recall": Interval(0.5, 0.25, 0.75, 8)}
    >>> print(format_table({"adapter": rows, "base": rows}))
    .                    adapter                   base  records
    fact recall          0.500 [0.250, 0.750]     0.500        8
    """
    first, *others = columns
    names = list(dict.fromkeys(name for rows in columns.values() for name in rows))
    shown = {name: f"{one.mean:.3f} [{one.low:.3f}, {one.high:.3f}]" for name, one in columns[first].items()}
    width, wide = max(20, *map(len, names)), max(20, *map(len, shown.values()))  # a length ratio may have two digits
    lines = [f"{'.':<{width}} {first:<{wide}}" + "".join(f"{name:>10}" for name in others) + "  records"]
    for name in names:
        means = [f"{columns[other][name].mean:.3f}" if name in columns[other] else "-" for other in others]
        counted = next(rows[name].records for rows in columns.values() if name in rows)
        mine = shown.get(name, "-")
        lines.append(f"{name:<{width}} {mine:<{wide}}" + "".join(f"{mean:>10}" for mean in means) + f"{counted:>9}")
    return "\n".join(lines)
