"""Replayed greedy decoding against decoding for real, and against counting by hand."""

import torch
from torch.nn import functional

import kdcore
from kdcore.components.choice import Choice
from kdcore.components.registry import installed
from kdcore.data.batching.anchors import at_anchors
from kdcore.data.rows import RowDataset, batch_of, collate
from kdcore.decoding.loop import Decoder, Stop
from kdcore.evaluation.drafts import HeldOutDrafts, measure_drafts
from kdcore.method.logits import Head, HiddenLogits
from kdcore.method.records import Row
from kdcore.models.assembly import Assembly
from kdcore.runs.progress import Silent
from kdcore.training.views import DrafterView
from tests.tiny.models import language_model
from tests.tiny.toy_drafter import Matrices, Params

PAD = {"input_ids": 0, "attention_mask": 0}


def row(tokens: list[int], prompt: int) -> Row:
    ids = torch.tensor(tokens)
    mask = torch.arange(len(tokens) - 1) >= prompt - 1
    inputs = {"input_ids": ids[:-1], "attention_mask": torch.ones_like(ids[:-1])}
    return Row(inputs, ids[1:], mask, "row")


def logits_of(ranks: list[list[int]], labels: torch.Tensor, mask: torch.Tensor) -> HiddenLogits:
    """Scores that put each masked label at the rank that is asked for."""
    wanted = torch.tensor(ranks)[mask]
    scores = torch.zeros(len(wanted), 40)
    for score, rank, label in zip(scores, wanted.tolist(), labels[mask].tolist(), strict=True):
        others = [token for token in range(40) if token != label]
        score[others[:rank]] = 2.0
        score[label] = 1.0
    return HiddenLogits(scores, Head(), 40)


def test_the_replay_by_hand() -> None:
    padded = collate([(0, row([1, 2, 3, 4, 5, 6, 7, 8], prompt=2))], PAD)
    batch = batch_of(at_anchors(padded, 2, None))
    # anchors 0 to 6; the token after the next is learned for 0 to 5
    ranks = [[0, 0], [9, 9], [9, 9], [1, 0], [0, 9], [0, 9], [9, 9]]
    drafted = logits_of(ranks, batch.labels, batch.mask)
    found = measure_drafts(lambda _: drafted, [batch], candidates=2, chunk=4)
    assert found.lengths == [6]
    # chain: anchor 0 gives 3 tokens, 3 gives 1, 4 gives 2. Tree: anchor 3 gives one more.
    assert found.ratios == {
        "tau": ([6], [3]),
        "tau_tree": ([6], [3]),
        "level_1": ([3], [6]),
        "level_2": ([2], [5]),
    }
    assert found.means()["tau"] == 2.0


def test_the_replay_is_what_decoding_does() -> None:
    """Also where the row ends in the middle of a draft. Some drafts are right: it was trained."""
    target = language_model(layers=3, seed=5)
    drafter = Matrices(Params(), None)
    torch.manual_seed(0)
    drafter.bind(target, None)
    verifier = Assembly(installed()).build(Choice("verifier", "greedy", kdcore.Params()))
    rows, plain = [], Decoder(target, drafter, verifier)
    for seed in range(6):
        prompt = torch.randint(3, 61, (1, 4 + seed), generator=torch.Generator().manual_seed(seed))
        (answer,) = plain.generate(prompt, torch.ones_like(prompt), Stop(17))
        rows.append(row(prompt[0].tolist() + answer, prompt.shape[1]))
    held = HeldOutDrafts(RowDataset(rows), PAD, 4, 2, 5, Silent())

    def alone(one: Row) -> HeldOutDrafts:
        return HeldOutDrafts(RowDataset([one]), PAD, 1, 2, 5, Silent())

    view = DrafterView(target, drafter)
    padded = at_anchors(collate(list(enumerate(rows)), PAD), drafter.depth, None)
    optimizer = torch.optim.Adam(drafter.parameters(), 3e-2)
    for _ in range(30):
        drafted, _ = view(drafter, batch_of(padded))
        logits = drafted.from_linear(drafted.head.linear(drafted.hidden))
        functional.cross_entropy(logits, padded["labels"][padded["mask"]]).backward()
        optimizer.step()
        optimizer.zero_grad()

    rounds = []
    for prompt, known in ((r.inputs["input_ids"][: len(r.labels) - 16], r) for r in rows):
        decoder = Decoder(target, drafter, verifier)
        decoder.generate(prompt[None], torch.ones_like(prompt)[None], Stop(17))
        rounds.append(decoder.counter.rounds)
        assert int(known.mask.sum()) == 17
    found = held.measure(view)
    assert found.ratios["tau"] == ([17] * 6, rounds)
    assert sum(rounds) < 80
    assert all(
        tree <= chain for tree, chain in zip(found.ratios["tau_tree"][1], rounds, strict=True)
    )
    singly = [held_one.measure(view).ratios for held_one in map(alone, rows)]
    assert found.ratios == {
        name: tuple([count for one in singly for count in one[name][side]] for side in (0, 1))
        for name in found.ratios
    }
