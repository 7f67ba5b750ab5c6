"""What has to be known of a comparison before its table is believed, in sentences."""

from __future__ import annotations

from collections.abc import Iterator

from kdcore.reporting.run_record import Arm, ChosenBy, Comparison


def notes(comparison: Comparison) -> Iterator[str]:
    """Who lacks seeds, whom the rows flatter, by what a grid's points were chosen, and which."""
    for arm in comparison.arms:
        lacking = [str(seed) for seed in comparison.seeds if seed not in arm.seeds]
        if arm.figures and lacking:
            yield (
                f"{arm.arm} lacks seed {', '.join(lacking)}: its figures are of the others, and a "
                "difference is over the seeds that both have"
            )
    if comparison.kept_by_these_rows:
        arms = ", ".join(comparison.kept_by_these_rows)
        yield (
            f"kept at their best on these very rows (training.eval_every), which flatters "
            f"them: {arms}"
        )
    if comparison.chosen_by:
        yield _chosen_by(comparison.chosen_by)
    yield from (f"  {_chosen(arm)}" for arm in comparison.arms if arm.grid)


def _chosen_by(choice: ChosenBy) -> str:
    """By which figure, of which rows: not those of the table."""
    best = "lowest" if choice.metric.better == "lower" else "highest"
    seeds = ", ".join(map(str, choice.seeds))
    return (
        f"each arm at the point of the grid where its {choice.metric.title} was {best} on the "
        f"validation rows ({choice.rows.get('path', choice.rows['name'])}), "
        + (f"in the mean of seeds {seeds}:" if len(choice.seeds) > 1 else f"seed {seeds}:")
    )


def _chosen(arm: Arm) -> str:
    """What was chosen for an arm, and whether a better value may lie beyond its grid."""
    said = []
    for name, value in (arm.chosen or {}).items():
        tried = [point.fields[name] for point in arm.grid]
        ordered = all(type(each) in (int, float) for each in tried)  # what has edges
        at_edge = ordered and min(tried) < max(tried) and value in (min(tried), max(tried))
        said.append(f"{name} {value}" + (" (the edge of the grid)" if at_edge else ""))
    return f"{arm.arm}: {', '.join(said) or 'nothing to choose from'}"
