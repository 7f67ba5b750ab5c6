"""GOLD's hybrid loss: shared classes by a divergence, the others sorted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kdcore.data.alignment.vocabulary import bind_splitters, meanings
from kdcore.data.rows import batch_of
from kdcore.errors import UserError
from kdcore.method.loss_engine import LossEngine, StepLoss
from kdcore.method.objective import Objective
from kdcore.testing.method.batches import example
from kdcore.training.method import objective_of
from kdcore_alignment import Gold
from kdcore_baselines import forward_kl, jsd, total_variation
from tests.plugins.alignment.test_uld import Pair, learned, pair, spans_of
from tests.reference.uld import generalised_jsd, of_span, sorted_distance
from tests.tiny.tiny_chat_models import OTHER_TEXT, tiny_tokenizer

OURS, THEIRS = tiny_tokenizer(text=OTHER_TEXT, size=276), tiny_tokenizer()


def objective(gold: Gold, beta: float = 0.5, **rest: Any) -> Objective:
    made = objective_of(
        {},
        [gold],
        jsd(beta=beta),
        {"own": 2.0},
        part_divergences={"own": total_variation()},
        normalize="accepted",
        **rest,
    )
    bind_splitters(made, OURS, THEIRS)
    return made


def loss(pair: Pair, made: Objective, chunk: int = 512) -> StepLoss:
    return LossEngine(made, {"all": tuple(made.weights)}, chunk)(
        *pair.view(pair.student, pair.batch, 0.0),
        pair.batch,
        whole=float(len(pair.batch.mask)),
        progress=0.0,
        generator=torch.Generator().manual_seed(0),
    )


def both() -> list[tuple[int, int]]:
    """The numbers of the tokens of one text, student's and teacher's, from their strings."""
    ours, theirs = OURS.get_vocab(), THEIRS.get_vocab()
    return [(ours[text], theirs[text]) for text in ours if text in theirs]


@pytest.mark.parametrize(
    ("alignment", "merge", "adaptive", "tau"),
    [("spans", "none", False, 2.0), ("spans_last", "product", True, 1.0)],
)
def test_the_loss_is_the_formula(alignment: Any, merge: Any, adaptive: bool, tau: float) -> None:
    made = pair(alignment)
    base = -1 if alignment == "spans_last" else 0
    models = (
        (made.student, made.batch),
        (made.teacher, batch_of(made.rows.collated(made.batch.index))),
    )
    ours, theirs = (learned(*each) for each in models)
    shared = np.array(both()).T
    alone = [
        np.setdiff1d(np.arange(len(of)), numbers)
        for of, numbers in zip((OURS, THEIRS), shared, strict=True)
    ]
    share = shared.shape[1] / len(THEIRS)
    weights = (share, 1 - share) if adaptive else (1.0, 1.0)
    expected = []
    for n, aligned in enumerate(made.rows.aligned_rows):
        distances = []
        for each in spans_of(aligned):
            sides = []
            for (logits, labels), place in ((ours[n], each.ours), (theirs[n], each.theirs)):
                of, kept = logits[place.start : place.stop] / tau, [labels[t] for t in place]
                if merge == "none":
                    of, kept = of[[base]], kept[:1]
                sides.append(of_span(of, kept, base))
            q, p = sides
            same = generalised_jsd(p[shared[1]], q[shared[0]], 0.3)
            others = sorted_distance(p[alone[1]], q[alone[0]])
            distances.append(weights[0] * same + weights[1] * others)
        expected.append(np.mean(distances))
    found = loss(made, objective(Gold(merge=merge, adaptive=adaptive), beta=0.3, tau=tau))
    assert float(found.losses["all"].detach()) == pytest.approx(
        tau**2 * float(np.mean(expected)), rel=1e-5
    )


def test_the_length_of_a_chunk_does_not_matter() -> None:
    made, method = pair("spans_last"), objective(Gold())
    weights = list(made.student.parameters())
    found = [loss(made, method, chunk).losses["all"] for chunk in (1, 512)]
    grads = [torch.autograd.grad(each, weights) for each in found]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_equal_models_have_no_loss() -> None:
    made = pair("spans", same_tokenizer=True, same_model=True)
    method = objective(Gold())
    bind_splitters(method, THEIRS, THEIRS)
    assert loss(made, method).losses["all"].item() == pytest.approx(0, abs=1e-6)


def test_of_equal_vocabularies_it_is_the_divergence() -> None:
    """Unbound, as within a loop of one's own, where both models have one tokenizer."""
    batch, gate = example(), torch.ones(example().mask.shape)
    one = objective_of({}, [Gold()], jsd(beta=0.5), {}).terms(batch, gate)
    plain = objective_of({}, [], jsd(beta=0.5), {}).terms(batch, gate)
    torch.testing.assert_close(one["shared"], plain["kd"])
    assert not one["own"].any()


def test_what_one_model_has_alone_is_compared_as_uld_does() -> None:
    batch, gate = example(), torch.ones(example().mask.shape)
    last = batch.teacher.shape[-1] - 1
    gold = Gold(adaptive=False)
    gold.bind([*range(last), "end"], [*(-1 - n for n in range(last)), "end"])
    own = objective_of({}, [gold], total_variation(), {}).terms(batch, gate)["own"]
    sides = (each.detach().softmax(-1)[..., :last] for each in (batch.student, batch.teacher))
    first, second = (each.sort(-1).values for each in sides)
    torch.testing.assert_close(own.detach(), (first - second).abs().sum(-1) / 2)


def test_bytes_and_special_tokens_are_found_by_their_text() -> None:
    ours, theirs = meanings(OURS), meanings(THEIRS)
    assert ours[OURS.convert_tokens_to_ids("<|im_end|>")] == "<|im_end|>"
    assert ours[OURS.convert_tokens_to_ids("Ġ")] == b" "
    assert len(set(ours)) == len(ours) == len(OURS)
    assert {(ours.index(each), theirs.index(each)) for each in {*ours} & {*theirs}} == {*both()}


def test_two_tokens_of_one_text_count_once() -> None:
    gold = Gold()
    gold.bind([b"a", b"b", b"a"], [b"b", b"a"])
    shared = gold.classes(torch.zeros(3), torch.zeros(2)).shared
    assert [each.tolist() for each in shared] == [[2, 1], [1, 0]]


def test_what_gold_cannot_compare_is_refused() -> None:
    with pytest.raises(UserError, match="there are none"):
        Gold().bind([b"a"], [b"b"])
    with pytest.raises(UserError, match="an earlier splitter has cut"):
        objective_of({}, [Gold(), Gold()], forward_kl(), {})
    with pytest.raises(UserError, match="names unknown part 'onw'"):
        objective_of({}, [Gold()], forward_kl(), {}, part_divergences={"onw": forward_kl()})
