"""Declares one sound component of each form, and the faulty ones with the checks meant for them."""

from collections.abc import Iterable
from dataclasses import dataclass

from kdcore.components.component import Component, Kind
from kdcore.components.hookspecs import hookimpl

MODULES = {
    "drafter": "drafting_components",
    "tree": "drafting_components",
    "verifier": "verifiers",
    "engine": "engines",
    "baseline": "baselines",
}
"""Where the classes of a kind are, if not among the `components`."""

SOUND = {
    "sound_gate": "gate",
    "sound_ranked": "gate",
    "sound_learning": "gate",
    "sound_splitter": "splitter",
    "sound_divergence": "divergence",
    "sound_momentum": "momentum",
    "sound_source": "source",
    "sound_drafter": "drafter",
    "sound_sampler": "drafter",
    "sound_learner": "drafter",
    "sound_tree": "tree",
    "sound_grower": "tree",
    "sound_verifier": "verifier",
    "sound_greedy": "verifier",
    "sound_lossy": "verifier",
    "sound_engine": "engine",
    "sound_baseline": "baseline",
}


@dataclass(frozen=True)
class Fault:
    """A component that breaks what `checks` check, and nothing else."""

    kind: Kind
    name: str
    checks: tuple[str, ...]
    reference: bool = False


LOSSLESS = (
    "test_fixed_candidates_leave_the_targets_distribution",
    "test_sampled_candidates_leave_the_targets_distribution",
)

READS = (
    "test_rows_leave",
    "test_a_tree_has_the_logits_and_features_of_its_paths",
    "test_what_was_kept_stays_and_the_rest_is_hidden",
)
UNSEEDED = "test_without_a_generator_it_draws_from_torchs_own"
TRAINING = "test_training_reaches_all_its_weights_and_leaves_the_target_alone"

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
    Fault("drafter", "drafts_twins", ("test_siblings_are_distinct",)),
    Fault(
        "drafter",
        "drafts_seeing_siblings",
        (
            "test_parents_come_before_children",
            "test_greedy_decoding_with_it_says_what_the_target_says",
        ),
    ),
    Fault("drafter", "drafts_for_finished", ("test_a_row_without_new_tokens_proposes_nothing",)),
    Fault(
        "drafter", "reads_padded_tokens", ("test_rows_do_not_see_each_other", "test_start_forgets")
    ),
    Fault(
        "drafter",
        "stale_cache",
        ("test_a_draft_depends_on_the_committed_tokens_alone", "test_rows_do_not_see_each_other"),
    ),
    Fault(
        "drafter",
        "never_forgets",
        ("test_start_forgets", "test_a_resumed_run_goes_on_bit_for_bit"),
    ),
    Fault("drafter", "alters_target", ("test_greedy_decoding_with_it_says_what_the_target_says",)),
    Fault("drafter", "lists_layers", ("test_the_layers_it_reads_are_the_targets",)),
    Fault("drafter", "drafts_globally", ("test_randomness_comes_from_the_generator_alone",)),
    Fault("drafter", "drafts_seeded_only", (UNSEEDED,)),
    Fault("drafter", "misstates_logp", ("test_tokens_are_drawn_from_what_logp_says",)),
    *(
        Fault("drafter", name, (TRAINING,))
        for name in (
            "detaches_levels",
            "forgets_a_level",
            "climbs_uphill",
            "owns_the_embeddings",
            "thaws_the_target",
            "writes_to_the_target",
        )
    ),
    Fault("tree", "twin_children", ("test_siblings_are_distinct",)),
    Fault("tree", "children_first", ("test_parents_come_before_children",)),
    Fault("tree", "sees_siblings", ("test_parents_come_before_children",)),
    Fault("tree", "hides_branches", ("test_a_tree_that_branches_says_so",)),
    Fault("tree", "too_deep", ("test_no_node_is_deeper_than_the_levels",)),
    Fault("tree", "drafts_for_all", ("test_a_row_that_is_not_active_proposes_nothing",)),
    Fault("tree", "averages_levels", ("test_rows_do_not_see_each_other",)),
    Fault("tree", "leaves_orphans", ("test_a_tree_has_the_form_of_its_record",)),
    Fault("tree", "expands_another", ("test_it_grows_below_what_it_asked_about",)),
    Fault("verifier", "no_residual", LOSSLESS),
    Fault("verifier", "keeps_too_much", LOSSLESS),
    Fault("verifier", "hides_chain", ("test_it_says_whether_it_follows_a_single_chain",)),
    Fault("verifier", "keeps_padding", ("test_padding_is_never_kept",)),
    Fault("verifier", "verifies_globally", ("test_randomness_comes_from_the_generator_alone",)),
    Fault("verifier", "verifies_seeded_only", (UNSEEDED,)),
    Fault("verifier", "keeps_nothing", ("test_it_keeps_what_the_target_would_say",)),
    Fault("verifier", "writes_mask", ("test_the_tree_is_left_alone",)),
    Fault(
        "verifier",
        "skips_node",
        (
            "test_a_verdict_is_a_path_and_a_token_that_may_follow",
            "test_it_keeps_what_the_target_would_say",
        ),
    ),
    Fault(
        "verifier",
        "second_best",
        (
            "test_a_tree_without_nodes_gives_the_targets_own_token",
            "test_a_verdict_is_a_path_and_a_token_that_may_follow",
            "test_without_chance_it_emits_the_likeliest_tokens",
        ),
    ),
    Fault("verifier", "asks_the_parent", LOSSLESS),
    *(
        Fault("engine", name, READS)
        for name in ("ignores_masks", "counts_positions", "sorts_layers")
    ),
    Fault(
        "engine",
        "never_empties",
        ("test_it_counts_its_slots", "test_a_resumed_run_goes_on_bit_for_bit"),
    ),
    Fault("engine", "keeps_other_slots", (READS[2],)),
    Fault("engine", "never_compacts", ("test_it_counts_its_slots", READS[0], READS[2])),
    Fault("engine", "keeps_other_rows", ("test_rows_leave",)),
    Fault("engine", "gives_all_logits", ("test_it_returns_the_logits_that_are_asked_for",)),
    Fault("engine", "leaves_hooks", ("test_the_target_is_left_alone",)),
    Fault("engine", "takes_any_layer", ("test_a_layer_that_the_target_lacks_is_refused",)),
    Fault("baseline", "answers_in_reverse", ("test_greedy_answers_are_the_targets",)),
    Fault("baseline", "drops_the_end", ("test_an_answer_ends_with_its_end_token",)),
    Fault("baseline", "ignores_the_seed", ("test_sampling_follows_the_seed",)),
    Fault("baseline", "starts_once", ("test_other_settings_hold_after_a_start",)),
    Fault(
        "baseline",
        "reads_the_last_answer",
        (
            "test_a_second_batch_does_not_see_the_first",
            "test_sampling_follows_the_seed",
            "test_a_resumed_run_goes_on_bit_for_bit",
        ),
    ),
)


@hookimpl
def kdcore_components() -> Iterable[Component]:
    """Each is a class of the kind's module, named as the component is."""
    for name, kind in {**SOUND, **{fault.name: fault.kind for fault in FAULTS}}.items():
        title = "".join(word.capitalize() for word in name.split("_"))
        build = f"tests.kdcore.testing.{MODULES.get(kind, 'components')}:{title}"
        yield Component(kind=kind, name=name, build=build, summary="for a test", source="none")
