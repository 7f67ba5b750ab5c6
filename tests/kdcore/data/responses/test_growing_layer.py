"""The growing layer holds what transformers' own would, and writes where it stands."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kdcore.data.responses.growing_layer import GrowingLayer, growing_cache
from tests.tiny.models import language_model


def states(rows: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 2, count, 4), torch.randn(rows, 2, count, 3)


def test_it_holds_what_a_dynamic_layer_holds_while_rows_leave_and_tokens_are_taken_back() -> None:
    torch.manual_seed(0)
    ours, theirs = GrowingLayer(), DynamicLayer()
    rows = 4
    for count, keep, crop in [
        (5, None, 0),
        (1, [0, 2, 3], 0),
        (300, None, -2),
        (1, [1], 0),
        (1, None, 0),
    ]:
        keys, values = states(rows, count)
        for found, expected in zip(
            ours.update(keys, values), theirs.update(keys, values), strict=True
        ):
            assert torch.equal(found, expected)
        for layer in (ours, theirs):
            layer.crop(crop)
            if keep is not None:
                layer.reorder_cache(torch.tensor(keep))
        rows = len(keep) if keep is not None else rows
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)


def test_a_token_is_written_behind_the_others_which_stay_where_they_are() -> None:
    layer = GrowingLayer()
    before, _ = layer.update(*states(2, 7))
    after, _ = layer.update(*states(2, 1))
    assert after.data_ptr() == before.data_ptr()


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_only_layers_without_a_bound_are_replaced(family: str) -> None:
    config = language_model(family, seed=0).config
    ours, theirs = growing_cache(config).layers, DynamicCache(config=config).layers
    assert [type(layer) is GrowingLayer for layer in ours] == [
        type(layer) is DynamicLayer for layer in theirs
    ]
