"""A replay shows every round of the decode it is of, and changes nothing in it."""

import functools

import torch

from kdcore.decoding.loop import Decoder, Stop
from kdcore.decoding.sampling import Sampling
from kdcore.evaluation.replay import replay
from kdcore.runs.results import Replay
from kdcore_baselines.drafters.untrained import Nothing
from kdcore_baselines.trees import Backbone
from kdcore_baselines.verifiers import Greedy
from kdcore_baselines.verifiers import Sampling as SamplingVerifier
from tests.tiny.drafters import Levels, clueless, oracle
from tests.tiny.targets import CLASSES, generated, prompts, tiny

COUNT, DEPTH, K = 11, 3, 2
PROMPT = prompts(1)[0]


class Numbers:
    """A tokenizer's one use here."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


@functools.cache
def answer() -> list[int]:
    return generated(tiny("llama"), [PROMPT], COUNT)[0]


def backbone(rank: int) -> Levels:
    levels = oracle([[*PROMPT, *answer()]], DEPTH, CLASSES, rank=rank)
    return Levels(levels, Backbone(K))


def greedy(drafter: object) -> Decoder:
    return Decoder(tiny("llama"), drafter, Greedy(None, None))


def replayed(decoder: Decoder, stop: Stop) -> Replay:
    return replay(decoder, PROMPT, Numbers(), "mine", stop, seed=3)


def said(found: Replay) -> list[int]:
    return [int(token) for each in found.rounds for token in each.emitted]


def test_a_drafter_that_knows_all_has_its_chain_accepted_and_no_branch() -> None:
    found = replayed(greedy(backbone(rank=0)), Stop(COUNT))
    assert (found.method, found.prompt) == ("mine", Numbers().decode(PROMPT))
    assert said(found) == answer()
    assert [len(each.emitted) for each in found.rounds] == [4, 4, 3]
    assert found.tau == COUNT / 3
    for each in found.rounds[:2]:
        assert [node.parent for node in each.nodes] == [-1, -1, 0, 0, 2, 2]
        assert [node.accepted for node in each.nodes] == [True, False] * 3
        kept = [node.text for node in each.nodes if node.accepted]
        assert kept == each.emitted[:-1]
    # the last round may emit 3 tokens, so that nodes at depth 3 are not proposed at all
    assert [node.parent for node in found.rounds[2].nodes] == [-1, -1, 0, 0]


def test_the_branch_that_was_right_is_the_one_accepted() -> None:
    found = replayed(greedy(backbone(rank=1)), Stop(COUNT))
    assert said(found) == answer()
    assert [node.accepted for node in found.rounds[0].nodes] == [False, True] + [False] * 4


def test_what_comes_after_the_end_is_not_accepted() -> None:
    stop = Stop(COUNT, end=(answer()[1],))
    found = replayed(greedy(backbone(rank=0)), stop)
    assert said(found) == answer()[:2]
    (only,) = found.rounds
    assert [node.accepted for node in only.nodes] == [True, False, True, False, False, False]


def test_a_round_without_proposals_has_no_nodes() -> None:
    found = replayed(greedy(Nothing(None, None)), Stop(4))
    assert [each.nodes for each in found.rounds] == [[]] * 4 and found.tau == 1.0


def test_sampling_draws_what_it_draws_unwatched() -> None:
    def sampled() -> Decoder:
        drafter = Levels(clueless(DEPTH, CLASSES), Backbone(K))
        return Decoder(
            tiny("llama"), drafter, SamplingVerifier(None, None), Sampling(temperature=1.0)
        )

    ids = torch.tensor([PROMPT])
    generator = torch.Generator().manual_seed(3)
    (row,) = sampled().generate(ids, torch.ones_like(ids), Stop(COUNT), generator)
    assert said(replayed(sampled(), Stop(COUNT))) == row
