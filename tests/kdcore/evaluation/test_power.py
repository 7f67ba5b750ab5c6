"""The power of a comparison: against studies that are simulated row by row and then measured."""

from __future__ import annotations

import numpy as np
import pytest

from kdcore.errors import UserError
from kdcore.evaluation.bootstrap import paired_differences
from kdcore.evaluation.power import Spread, detectable_difference, spreads
from kdcore.runs.results import Measured


def study(
    generator: np.random.Generator, difference: float, spread: Spread, rows: int, seeds: int
) -> tuple[list[Measured], list[Measured]]:
    """Two methods whose rows and seeds differ as a spread says, by a true difference."""
    hard = generator.normal(0.0, 3.0, rows)
    of_row = generator.normal(0.0, spread.rows, rows)
    ours, theirs = [], []
    for of_seed in generator.normal(0.0, spread.seeds, seeds):
        theirs.append(Measured([1] * rows, scores={"score": [*hard]}))
        ours.append(
            Measured([1] * rows, scores={"score": [*(hard + of_row + of_seed + difference)]})
        )
    return ours, theirs


SIZES = [(Spread(1.0, 0.2), 60, 5), (Spread(0.3, 0.0), 40, 3), (Spread(1.0, 0.0), 50, 1)]


@pytest.mark.parametrize(("spread", "rows", "seeds"), SIZES)
def test_four_of_five_studies_see_the_detectable_difference(
    spread: Spread, rows: int, seeds: int
) -> None:
    generator, studies = np.random.default_rng(7), 400
    difference = detectable_difference(spread, rows=rows, seeds=seeds)
    made = (study(generator, difference, spread, rows, seeds) for _ in range(studies))
    seen = sum(paired_differences(*each, draws=300)["score"].low > 0 for each in made)
    assert seen / studies == pytest.approx(0.8, abs=3 * (0.8 * 0.2 / studies) ** 0.5 + 0.02)


def test_a_pilot_tells_its_spread() -> None:
    spread = Spread(0.5, 0.25)
    ours, theirs = study(np.random.default_rng(1), 0.1, spread, 4000, 200)
    found = spreads(ours, theirs)["score"]
    assert found.rows == pytest.approx(0.5, rel=0.05)
    assert found.seeds == pytest.approx(0.25, rel=0.2)


def test_a_sum_over_tokens_is_a_ratio() -> None:
    """Rows of twice the length count twice, and a common difficulty cancels out."""
    lengths = [1, 2] * 50
    sums = [float(n) for n in lengths]
    ours = Measured(lengths, sums={"kl": [2 * s for s in sums]})
    theirs = Measured(lengths, sums={"kl": sums})
    assert spreads([ours], [theirs])["kl"] == Spread(pytest.approx(0.0, abs=1e-12), 0.0)


def test_limits() -> None:
    """Without any spread every difference is seen; with no seeds' spread, z and the power's z."""
    assert detectable_difference(Spread(0.0, 0.0), rows=9, seeds=5) == 0.0
    found = detectable_difference(Spread(1.0, 0.0), rows=100, seeds=1, draws=200_000)
    assert found == pytest.approx((1.959964 + 0.841621) / 10, rel=0.01)


def test_more_rows_or_seeds_see_less() -> None:
    spread = Spread(1.0, 0.3)
    sizes = [(50, 3), (500, 3), (500, 5), (500, 10)]
    found = [detectable_difference(spread, rows=r, seeds=s) for r, s in sizes]
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"seeds": 0}, {"power": 1.0}])
def test_a_study_of_nothing_is_refused(wrong: dict[str, float]) -> None:
    asked: dict[str, float] = {"rows": 5, "seeds": 3} | wrong
    with pytest.raises(UserError, match="cannot be simulated"):
        detectable_difference(Spread(1.0, 0.0), **asked)  # type: ignore[arg-type]
