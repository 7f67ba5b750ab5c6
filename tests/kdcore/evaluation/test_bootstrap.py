"""The paired bootstrap: coverage, pairing, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from kdcore.evaluation.bootstrap import paired_differences
from kdcore.runs.results import Measured


def measured(kl: np.ndarray, lengths: list[int]) -> Measured:
    sums = {"teacher_kl": (kl * lengths).tolist(), "cross_entropy": (kl * lengths).tolist()}
    return Measured(lengths, sums)


def test_the_mean_is_over_positions_and_rows_cancel() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 9, size=50).tolist()
    hard = generator.exponential(5.0, size=50)  # rows differ far more than students do
    ours = [measured(hard + 0.1, lengths) for _ in range(3)]
    theirs = [measured(hard, lengths) for _ in range(3)]
    found = paired_differences(ours, theirs)["teacher_kl"]
    assert found.mean == pytest.approx(0.1)
    assert found.low == pytest.approx(0.1) and found.high == pytest.approx(0.1)
    assert found.distinguishable


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    lengths, covered = [1] * 60, 0
    for trial in range(200):
        noise = generator.normal(0.3, 1.0, size=60)
        pair = [measured(noise, lengths)], [measured(np.zeros(60), lengths)]
        found = paired_differences(*pair, draws=400, seed=trial)["teacher_kl"]
        covered += found.low <= 0.3 <= found.high
    assert 0.90 <= covered / 200 <= 0.99


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("noise_of_rows", [0.2, 1.0, 5.0])
def test_of_few_seeds_too_it_covers_the_truth_as_often_as_it_says(
    seeds: int, noise_of_rows: float
) -> None:
    """Whether training varies more than rows do, or less; at most a little too wide."""
    generator, lengths, covered = np.random.default_rng(4), [1] * 40, 0
    for trial in range(300):
        rows = generator.normal(0.0, noise_of_rows, size=40)
        ours = [
            measured(0.3 + rows + generator.normal(0, 0.5) + generator.normal(0, 0.2, 40), lengths)
            for _ in range(seeds)
        ]
        found = paired_differences(
            ours, [measured(np.zeros(40), lengths)] * seeds, draws=200, seed=trial
        )["teacher_kl"]
        covered += found.low <= 0.3 <= found.high
    assert covered / 300 >= 0.92


def test_seeds_that_disagree_widen_the_interval() -> None:
    lengths = [1] * 40
    base = np.zeros(40)
    one = paired_differences([measured(base + 1, lengths)], [measured(base, lengths)])
    many = paired_differences(
        [measured(base + shift, lengths) for shift in (3.0, 1.0, -1.0)],
        [measured(base, lengths)] * 3,
    )
    assert one["teacher_kl"].distinguishable
    assert many["teacher_kl"].mean == pytest.approx(1.0)
    assert not many["teacher_kl"].distinguishable


def test_perplexity_is_compared_as_perplexity() -> None:
    lengths = [2, 2]
    found = paired_differences(
        [measured(np.array([1.0, 1.0]), lengths)], [measured(np.array([0.0, 0.0]), lengths)]
    )
    assert found["perplexity"].mean == pytest.approx(np.e - 1)
    assert "cross_entropy" not in found


def test_other_rows_or_seeds_are_refused() -> None:
    one = measured(np.zeros(3), [1, 1, 1])
    with pytest.raises(ValueError, match="paired"):
        paired_differences([one], [measured(np.zeros(3), [1, 1, 2])])
    with pytest.raises(ValueError, match="paired"):
        paired_differences([one], [one, one])


def test_ratios_are_of_sums_over_rows_each_by_its_own_count() -> None:
    """As tokens per verification: few rounds over the same tokens are better."""
    generator = np.random.default_rng(3)
    tokens = generator.integers(5, 40, size=50)
    chain = np.maximum(tokens // 2, 1)
    rounds = [np.maximum(chain - saved, 1) for saved in (1, 0)]
    ours, theirs = (
        Measured(tokens.tolist(), ratios={"tau": (tokens.tolist(), each.tolist())})
        for each in rounds
    )
    assert ours.means() == {"tau": tokens.sum() / rounds[0].sum()}
    found = paired_differences([ours], [theirs])
    assert found.keys() == {"tau"}
    gap = found["tau"]
    assert gap.mean == pytest.approx(ours.means()["tau"] - theirs.means()["tau"])
    assert 0 < gap.low < gap.mean < gap.high
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_differences([ours], [Measured(tokens[::-1].tolist(), ratios=theirs.ratios)])


def test_scores_are_compared_by_answer() -> None:
    generator = np.random.default_rng(2)
    hard = generator.uniform(size=30)
    rows = np.zeros(4), [2, 1, 3, 5]  # fewer rows than answers: each is drawn among its own
    ours = Measured(measured(*rows).lengths, {}, {"rouge_l": (hard + 0.1).tolist()})
    theirs = Measured(measured(*rows).lengths, {}, {"rouge_l": hard.tolist()})
    found = paired_differences([ours], [theirs])
    assert found.keys() == {"rouge_l"}
    assert found["rouge_l"].low == pytest.approx(0.1) == pytest.approx(found["rouge_l"].high)
    noisy = Measured(ours.lengths, {}, {"rouge_l": generator.uniform(size=30).tolist()})
    gap = paired_differences([noisy], [theirs])["rouge_l"]
    mean = np.mean(noisy.scores["rouge_l"]) - hard.mean()
    assert gap.mean == pytest.approx(mean) and gap.low < mean < gap.high
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_differences([ours], [Measured(ours.lengths, {}, {"rouge_l": [0.5]})])
