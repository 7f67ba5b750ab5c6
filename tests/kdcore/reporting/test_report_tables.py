"""What a difference is called, by its interval as it is written."""

import pytest

from kdcore.reporting.report_tables import difference
from kdcore.runs.results import Difference, Metric

KL = Metric("teacher_kl", "KL", ".3f", "lower")
RIGHT = Metric("accuracy", "accuracy", ".1%", "higher")


@pytest.mark.parametrize(
    ("metric", "gap", "text", "style"),
    [
        (KL, (0.2, 0.1, 0.3), "+0.200 [+0.100, +0.300]", "worse"),
        (KL, (-0.2, -0.3, -0.1), "-0.200 [-0.300, -0.100]", "better"),
        (KL, (0.2, -0.1, 0.3), "+0.200 [-0.100, +0.300]", ""),
        (KL, (-2e-6, -3e-6, -1e-6), "-0.000 [-0.000, -0.000]", ""),
        (RIGHT, (0.02, 0.01, 0.03), "+2.0 [+1.0, +3.0] pp", "better"),
        (RIGHT, (0.02, 0.0004, 0.03), "+2.0 [+0.0, +3.0] pp", ""),
    ],
)
def test_a_difference_is_one_where_its_interval_as_written_leaves_0_out(
    metric: Metric, gap: tuple[float, float, float], text: str, style: str
) -> None:
    found = difference(Difference(*gap), metric)
    assert (found.text, found.style) == (text, style)
