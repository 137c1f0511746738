"""Tables of metrics have the rows of test_metrics.json."""

from lit_phi2.evaluation.metrics import Interval
from lit_phi2.report.metric_table import group_rows


def test_a_group_has_the_records_of_its_widest_metric() -> None:
    """Fact recall is over the records that have facts, chrF over all of the group."""
    recall, chrf, base = (Interval(0.5, 0.25, 0.75, records) for records in (3, 5, 4))
    columns = {
        "adapter": {"form explain": recall, "form explain: chrF": chrf, "category a": recall, "chrF": chrf},
        "base": {"form explain: chrF": base},
    }
    (row,) = group_rows(columns, "form")
    assert (row.name, row.records) == ("explain", 5)
    assert row.metrics == {"fact recall": {"adapter": recall}, "chrF": {"adapter": chrf, "base": base}}
