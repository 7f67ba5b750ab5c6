"""Declares one sound component of each form, and the faulty ones with the checks meant for them."""

from collections.abc import Iterable
from dataclasses import dataclass

from kdcore.hookspecs import Component, Kind, hookimpl

SOUND = {
    "sound_gate": "gate",
    "sound_ranked": "gate",
    "sound_learning": "gate",
    "sound_splitter": "splitter",
    "sound_divergence": "divergence",
    "sound_momentum": "momentum",
    "sound_source": "source",
}


@dataclass(frozen=True)
class Fault:
    """A component that breaks what `checks` check, and nothing else."""

    kind: Kind
    name: str
    checks: tuple[str, ...]
    reference: bool = False


FAULTS = (
    Fault("gate", "leaks_gradient", ("test_weights_are_detached",)),
    Fault("gate", "averages_rows", ("test_rows_do_not_see_each_other",)),
    Fault(
        "gate",
        "averages_positions",
        ("test_positions_do_not_see_each_other", "test_padding_changes_nothing"),
    ),
    Fault("gate", "reads_padding", ("test_padding_changes_nothing",)),
    Fault("gate", "draws_globally", ("test_randomness_comes_from_the_batch_alone",)),
    Fault("gate", "draws_unevenly", ("test_positions_do_not_see_each_other",)),
    Fault("gate", "exceeds_one", ("test_weights_are_between_floor_and_one",)),
    Fault("gate", "naive_entropy", ("test_weights_are_finite_at_extreme_logits",)),
    Fault("gate", "ranks_by_place", ("test_the_ranking_ignores_order",)),
    Fault("gate", "needs_scores", ("test_the_ranking_works_on_one_score_and_on_none",)),
    Fault("gate", "writes_logits", ("test_the_batch_is_left_alone",)),
    Fault("gate", "forgets_threshold", ("test_a_resumed_run_goes_on_bit_for_bit",)),
    Fault("gate", "hidden_count", ("test_a_resumed_run_goes_on_bit_for_bit",)),
    Fault("gate", "wrong_sign", ("test_it_agrees_with_its_reference",), reference=True),
    Fault("splitter", "lies_about_parts", ("test_parts_says_what_comes_out",)),
    Fault("splitter", "undetached_weight", ("test_gradient_flows_to_the_student_alone",)),
    Fault("splitter", "mixes_teacher", ("test_gradient_flows_to_the_student_alone",)),
    Fault("splitter", "readmits_classes", ("test_excluded_classes_stay_excluded",)),
    Fault("splitter", "averages_weights", ("test_rows_do_not_see_each_other",)),
    Fault("splitter", "naive_odds", ("test_it_is_finite_at_extreme_logits",)),
    Fault("splitter", "half_a_weight", ("test_it_agrees_with_its_reference",), reference=True),
    Fault("divergence", "wrong_way", ("test_it_agrees_with_its_reference",), reference=True),
    Fault("divergence", "mean_over_positions", ("test_positions_do_not_see_each_other",)),
    Fault("divergence", "mean_over_rows", ("test_rows_do_not_see_each_other",)),
    Fault(
        "divergence",
        "sums_positions",
        ("test_it_gives_one_number_for_each_position", "test_positions_do_not_see_each_other"),
    ),
    Fault(
        "divergence",
        "nan_at_log_zero",
        ("test_excluded_classes_contribute_nothing", "test_it_is_finite_at_extreme_logits"),
    ),
    Fault("divergence", "cross_entropy", ("test_it_is_zero_at_equality_and_never_negative",)),
    Fault("divergence", "freezes_student", ("test_gradient_reaches_the_student",)),
    Fault("divergence", "smooths_teacher", ("test_excluded_classes_contribute_nothing",)),
    Fault("momentum", "forgets_buffers", ("test_a_resumed_run_goes_on_bit_for_bit",)),
    Fault("momentum", "gives_live_state", ("test_a_saved_state_stays_as_it_was",)),
    Fault("momentum", "keeps_given_state", ("test_a_saved_state_stays_as_it_was",)),
    Fault("momentum", "returns_buffers", ("test_what_comes_out_may_be_written_to",)),
    Fault("momentum", "drops_term", ("test_streams_hold_each_term_once",)),
    Fault("momentum", "ignores_stream", ("test_every_stream_reaches_the_update",)),
    Fault("momentum", "widens", ("test_the_update_has_the_form_of_the_parameters",)),
    Fault("momentum", "decays_in_place", ("test_parameters_are_only_read",)),
    Fault("momentum", "joins_unequal", ("test_it_agrees_with_its_reference",), reference=True),
    Fault("source", "unshifted", ("test_labels_are_what_each_position_must_predict",)),
)


@hookimpl
def kdcore_components() -> Iterable[Component]:
    """Each is a class of `tests.testing.components` named as the component is."""
    for name, kind in {**SOUND, **{fault.name: fault.kind for fault in FAULTS}}.items():
        title = "".join(word.capitalize() for word in name.split("_"))
        yield Component(kind, name, f"tests.testing.components:{title}", "for a test", "none")
