"""FastEagle's proposals in another engine's hands, against kdcore's own decoding."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from kdcore.components.choice import Choice
from kdcore.components.registry import installed
from kdcore.decoding.drafters.files import save_drafter
from kdcore.decoding.drafters.row_cache import RowCache
from kdcore.errors import UserError
from kdcore.models.folder.files import weights_digest
from kdcore.models.loading.load import load_model
from kdcore.specs.parts.fields import ModelSpec
from kdcore_fasteagle.serving import NewRows, Proposer, load_for_serving
from tests.tiny.targets import tiny
from tests.tiny.tiny_chat_models import tiny_tokenizer
from tests.tiny.trained_drafters import bound

PIECES = {"a": [5, 1, 3, 2], "b": [9, 4, 1, 1], "c": [2, 7, 0, 3]}
"""Rows that each request commits at each of four steps: a prompt, then what was accepted."""


def rows_of(request: str, count: int = 24) -> tuple[Tensor, Tensor]:
    """Tokens [N] and features [N, F] of a whole request."""
    generator = torch.Generator().manual_seed(ord(request[0]))
    tokens = torch.randint(61, (count,), generator=generator)
    return tokens, torch.randn(count, 3 * 32, generator=generator)


def pieces(request: str) -> Iterator[NewRows]:
    tokens, features = rows_of(request)
    begin = 0
    for count in PIECES[request]:
        yield NewRows(request, tokens[begin : begin + count], features[begin : begin + count])
        begin += count


@torch.no_grad()
def alone(drafter: Any, rows: NewRows) -> list[int]:
    """The likeliest of each level that kdcore's own `propose` gives after a piece more of a row."""
    if not len(rows.tokens):
        return []
    count = torch.tensor([len(rows.tokens)])
    proposed = drafter.propose(rows.tokens[None], rows.features[None], count, None)
    best: list[int] = proposed.tokens[0].unflatten(0, (drafter.depth, -1))[:, 0].tolist()
    return best


def expected(drafter: Any, request: str) -> list[list[int]]:
    drafter.start(torch.zeros(1))
    return [alone(drafter, rows) for rows in pieces(request)]


@pytest.mark.parametrize("vocabulary", [None, 40])
def test_drafts_are_those_of_kdcores_own_decoding(vocabulary: int | None) -> None:
    drafter = bound("fasteagle", tiny("llama"), depth=3, ffn=20, vocabulary=vocabulary)
    proposer = Proposer(drafter)
    steps = zip(*(pieces(request) for request in PIECES), strict=True)
    proposed = [proposer.propose(step) for step in steps]
    for place, request in enumerate(PIECES):
        own = [drafts[place] for drafts in proposed]
        assert own == expected(drafter, request)
        assert all(
            len(drafts) == 3 for count, drafts in zip(PIECES[request], own, strict=True) if count
        )
    assert proposed[2][2] == []  # no row was accepted of c's third piece


def test_requests_come_go_and_pause() -> None:
    drafter = bound("fasteagle", tiny("llama"), depth=2, ffn=20)
    proposer = Proposer(drafter)
    own = {request: expected(drafter, request) for request in PIECES}
    a, b, c = (list(pieces(request)) for request in PIECES)
    assert proposer.propose([a[0]]) == [own["a"][0]]
    assert proposer.propose([b[0], a[1]]) == [own["b"][0], own["a"][1]]
    assert proposer.propose([a[2], b[1]]) == [own["a"][2], own["b"][1]]  # in another order
    assert proposer.propose([b[2], c[0]]) == [own["b"][2], own["c"][0]]  # a pauses
    proposer.finish("b")
    assert "b" not in proposer
    assert proposer.propose([c[1], a[3]]) == [own["c"][1], own["a"][3]]
    assert proposer.propose([]) == []


def test_a_finished_request_leaves_nothing_under_its_name() -> None:
    drafter = bound("fasteagle", tiny("llama"), depth=2, ffn=20)
    proposer = Proposer(drafter)
    first, second, *_ = pieces("a")
    before = proposer.propose([first])
    continued = proposer.propose([second])
    proposer.finish("a")
    proposer.finish("never known")
    assert proposer.propose([first]) == before
    assert proposer.propose([second]) == continued


def test_a_request_named_twice_is_refused_and_harms_nothing() -> None:
    drafter = bound("fasteagle", tiny("llama"), depth=2, ffn=20)
    proposer = Proposer(drafter)
    first, second, *_ = pieces("a")
    proposer.propose([first])
    with pytest.raises(ValueError, match="twice"):
        proposer.propose([second, second])
    assert proposer.propose([second]) == [expected(drafter, "a")[1]]


def test_joined_caches_hold_what_each_held_and_padding_is_zero() -> None:
    size = bound("fasteagle", tiny("llama"), depth=1).layer_size
    caches = []
    for length in (3, 0, 2):
        cache = RowCache(1, 2, size, torch.zeros(()))
        cache.lengths += length
        shape = (2, 1, 4, size.key_heads, size.head)
        cache.storage = [torch.full(shape, float(length)) for _ in range(2)]
        caches.append(cache)
    joined = RowCache.join(caches)
    assert joined.lengths.tolist() == [3, 0, 2]
    assert all(layer.shape[:3] == (2, 3, 3) for layer in joined.storage)
    parts = joined.split()
    assert [int(part.lengths) for part in parts] == [3, 0, 2]
    assert all(
        (part.storage[1] == c.storage[1][:, :, :3]).all()
        for part, c in zip(parts, caches, strict=True)
    )
    empty = RowCache(1, 2, size, torch.zeros(()))
    assert (RowCache.join([empty, caches[0]]).storage[0][:, 0] == 0).all()


def saved(
    tmp_path: Path, name: str = "fasteagle", like: PreTrainedModel | None = None, **params: Any
) -> tuple[Path, ModelSpec, Any]:
    """A drafter folder, its target's spec, and the drafter bound to the whole target."""
    place = tmp_path / "target"
    (like or tiny("llama")).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    spec = ModelSpec.model_validate({"model": str(place)})
    target = load_model(spec)
    drafter = bound(name, target.model, **params)
    model = installed().component("drafter", name).params
    save_drafter(
        tmp_path / "drafter", drafter, Choice("drafter", name, model(**params)), target, installed()
    )
    return tmp_path / "drafter", spec, drafter


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("init", ["new", "target"])
def test_it_is_loaded_without_its_targets_layers(tmp_path: Path, init: str, tied: bool) -> None:
    target = tiny("llama", tie_word_embeddings=tied)
    folder, spec, whole = saved(tmp_path, like=target, depth=2, init=init, vocabulary=40)
    drafter = load_for_serving(folder, spec, installed(), torch.device("cpu"))
    proposer = Proposer(drafter)
    assert [proposer.propose([rows])[0] for rows in pieces("a")] == expected(whole, "a")
    assert not any(weight.is_meta for weight in drafter.parameters())


def test_an_embedding_that_is_more_than_a_table_is_refused(tmp_path: Path) -> None:
    folder, spec, _ = saved(tmp_path, like=tiny("gemma3"), depth=1)
    with pytest.raises(UserError, match="is not a plain table"):
        load_for_serving(folder, spec, installed(), torch.device("cpu"))


def test_a_target_of_other_names_is_refused(tmp_path: Path) -> None:
    folder, spec, _ = saved(tmp_path, depth=1)
    weights = tmp_path / "target" / "model.safetensors"
    stored = load_file(weights)
    renamed = {f"other.{name}": each for name, each in stored.items()}
    save_file(renamed, weights, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["target"]["digest"] = weights_digest(tmp_path / "target")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"does not contain the weight model\.embed_tokens\.weight"):
        load_for_serving(folder, spec, installed(), torch.device("cpu"))


def test_another_drafter_is_refused(tmp_path: Path) -> None:
    folder, spec, _ = saved(tmp_path, "medusa")
    with pytest.raises(UserError, match=r"Medusa.*only fasteagle"):
        load_for_serving(folder, spec, installed(), torch.device("cpu"))


def test_another_target_is_refused(tmp_path: Path) -> None:
    folder, spec, _ = saved(tmp_path, depth=1)
    tiny("llama", seed=3).save_pretrained(tmp_path / "target")
    with pytest.raises(UserError, match="in weights or config"):
        load_for_serving(folder, spec, installed(), torch.device("cpu"))
