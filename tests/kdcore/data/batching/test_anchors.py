"""Which token each level of each anchor is to predict."""

import torch

from kdcore.data.batching.anchors import at_anchors, known

LABELS = torch.tensor([[11, 12, 13, 14], [21, 22, 0, 0]])
MASK = torch.tensor([[False, True, True, True], [True, True, False, False]])
PADDED = {"labels": LABELS, "mask": MASK, "index": torch.tensor([5, 6])}


def test_level_i_of_an_anchor_predicts_what_stands_i_places_further_on() -> None:
    made = at_anchors(PADDED, 2, None)
    assert made["labels"].tolist() == [
        [12, 13], [13, 14], [14, 0], [0, 0],
        [22, 0], [0, 0], [0, 0], [0, 0],
    ]  # fmt: skip
    assert made["mask"].tolist() == [
        [True, True], [True, True], [True, False], [False, False],
        [True, False], [False, False], [False, False], [False, False],
    ]  # fmt: skip
    assert made["index"] is PADDED["index"]


def test_a_token_outside_the_vocabulary_is_marked_and_then_left_out() -> None:
    made = at_anchors(PADDED, 2, torch.tensor([12, 14, 22]))
    assert made["labels"].tolist()[:3] == [[0, -1], [-1, 1], [1, -1]]
    assert made["mask"].tolist()[:2] == [[True, True], [True, True]]
    assert known(made)["mask"].tolist()[:3] == [[True, False], [False, True], [True, False]]
    assert known(made)["mask"][4].tolist() == [True, False]


def test_a_draft_deeper_than_the_row_has_nothing_to_predict_there() -> None:
    made = at_anchors(PADDED, 9, None)
    assert made["mask"].shape == (8, 9)
    assert made["mask"].sum(1).tolist() == [3, 2, 1, 0, 1, 0, 0, 0]
