"""The loop against transformers' generate: the same tokens, whatever is drafted."""

import functools
import string
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, StoppingCriteriaList, StopStringCriteria

from kdcore.decoding.loop import Decoder, Stop
from kdcore.decoding.protocols import Drafter
from kdcore.decoding.sampling import Sampling
from kdcore.errors import UserError
from kdcore_baselines.drafters.untrained import Ngram, Nothing, SmallModel
from kdcore_baselines.drafting_components import ModelParams, NgramParams
from kdcore_baselines.trees import Backbone
from kdcore_baselines.verifiers import Greedy
from tests.tiny.drafters import Levels, clueless, oracle
from tests.tiny.targets import (
    CLASSES,
    CONTEXT,
    FAMILIES,
    Loads,
    generated,
    padded,
    prompts,
    tiny,
    tokenizer_of,
)

COUNT = 19
DEPTH = 4
TREES = {"chain": Backbone(1), "backbone": Backbone(3)}
GREEDY = Greedy(None, None)


@functools.cache
def reference(family: str, rows: int) -> list[list[int]]:
    return generated(tiny(family), prompts(rows), COUNT)


def whole(family: str, rows: int) -> list[list[int]]:
    """Prompts and what follows them."""
    return [a + b for a, b in zip(prompts(rows), reference(family, rows), strict=True)]


def small_model(family: str, seed: int) -> SmallModel:
    drafter = SmallModel(ModelParams(model="x", length=3), Loads(tiny(family, seed=seed)))
    drafter.bind(tiny(family), tokenizer_of())
    return drafter


DRAFTERS = {
    "nothing": lambda family, rows: Nothing(None, None),
    "ngram": lambda family, rows: Ngram(NgramParams(length=5), None),
    "itself": lambda family, rows: small_model(family, seed=0),
    "stranger": lambda family, rows: small_model(family, seed=1),
} | {
    f"{name} {tree}": functools.partial(
        lambda family, rows, make, tree: Levels(make(family, rows), TREES[tree]),
        make=make,
        tree=tree,
    )
    for tree in TREES
    for name, make in {
        "clueless": lambda family, rows: clueless(DEPTH, CLASSES),
        "oracle": lambda family, rows: oracle(whole(family, rows), DEPTH, CLASSES),
        "second": lambda family, rows: oracle(whole(family, rows), DEPTH, CLASSES, rank=1),
    }.items()
}
TAU = {
    "nothing": 1,
    "itself": 4,
    "oracle chain": DEPTH + 1,
    "oracle backbone": DEPTH + 1,
    "second chain": 1,
    "second backbone": 2,
}
"""Where it is known. COUNT is no multiple of DEPTH + 1, so the last round may emit less."""


def decode(family: str, drafter: Drafter, rows: int, stop: Stop, side: str = "left"):
    decoder = Decoder(tiny(family), drafter, GREEDY)
    return decoder.generate(*padded(prompts(rows), side), stop), decoder.counter


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_output_is_generates(family: str, name: str, rows: int) -> None:
    output, counter = decode(family, DRAFTERS[name](family, rows), rows, Stop(COUNT))
    assert output == reference(family, rows)
    assert counter.emitted == rows * COUNT
    assert rows * COUNT / counter.rounds == counter.tau >= 1
    if name in TAU:
        assert counter.rounds == rows * -(-COUNT // TAU[name])


def test_the_reference_is_not_one_token_over_and_over() -> None:
    for family in FAMILIES:
        assert all(len(set(row)) > 5 for row in reference(family, 3))


def test_padding_may_stand_on_the_right() -> None:
    output, _ = decode("gemma3", Ngram(NgramParams(), None), 3, Stop(COUNT), side="right")
    assert output == reference("gemma3", 3)


def test_a_prompt_of_one_token() -> None:
    rows = [[7], [3, 1, 4]]
    expected = generated(tiny("llama"), rows, 9)
    for drafter in (small_model("llama", 0), Ngram(NgramParams(), None), Nothing(None, None)):
        decoder = Decoder(tiny("llama"), drafter, GREEDY)
        assert decoder.generate(*padded(rows), Stop(9)) == expected
    alone = Decoder(tiny("llama"), small_model("llama", 0), GREEDY)
    assert alone.generate(*padded(rows[:1]), Stop(9)) == expected[:1]


def test_the_stream_yields_what_each_round_commits() -> None:
    drafter = Levels(oracle(whole("llama", 3), DEPTH, CLASSES))
    decoder = Decoder(tiny("llama"), drafter, GREEDY)
    rounds = list(decoder.stream(*padded(prompts(3)), Stop(12)))
    assert [[len(tokens) for tokens in row] for row in rounds] == [[5] * 3, [5] * 3, [2] * 3]


# ends


def first_at(row: list[int], earliest: int) -> int:
    """The first place not before `earliest` of a token that did not stand in the row before."""
    return next(n for n in range(earliest, len(row)) if row[n] not in row[:n])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("name", ["oracle chain", "oracle backbone", "stranger", "ngram"])
def test_an_end_token_in_the_middle_of_a_path(family: str, name: str) -> None:
    rows = reference(family, 3)
    ends = [rows[0][first_at(rows[0], 6)], rows[1][first_at(rows[1], 11)]]
    expected = [
        generated(tiny(family), [prompt], COUNT, eos_token_id=ends)[0] for prompt in prompts(3)
    ]
    assert min(map(len, expected)) < COUNT
    output, counter = decode(family, DRAFTERS[name](family, 3), 3, Stop(COUNT, tuple(ends)))
    assert output == expected
    assert counter.emitted == sum(map(len, expected))


def test_a_drafted_end_token_counts_as_accepted() -> None:
    row = reference("llama", 3)[0]
    place = first_at(row, 6)
    drafter = Levels(oracle(whole("llama", 3), DEPTH, CLASSES))
    decoder = Decoder(tiny("llama"), drafter, GREEDY)
    decoder.generate(*padded(prompts(3)[:1]), Stop(COUNT, (row[place],)))
    full, rest = divmod(place + 1, DEPTH + 1)
    assert rest, "the end is a bonus token"
    assert decoder.counter.accepted == Counter([DEPTH] * full + [rest])


def test_a_finished_row_stays_put_and_costs_no_round() -> None:
    rows = reference("llama", 3)
    place = first_at(rows[0], 6)
    end = rows[0][place]
    assert all(end not in row for row in rows[1:])
    drafter = Levels(oracle(whole("llama", 3), DEPTH, CLASSES))
    decoder = Decoder(tiny("llama"), drafter, GREEDY)
    lengths = []
    for _ in decoder.stream(*padded(prompts(3)), Stop(COUNT, (end,))):
        lengths.append(decoder.session.lengths.tolist())
    rounds = place // (DEPTH + 1) + 1
    assert [row[0] for row in drafter.lengths[rounds:]] == [0] * (len(drafter.lengths) - rounds)
    assert len({row[0] for row in lengths[rounds - 1 :]}) == 1
    assert len({row[1] for row in lengths}) == len(lengths)
    assert decoder.counter.rounds == rounds + 2 * len(lengths)


def test_a_refused_end_token_ends_nothing() -> None:
    rows = reference("llama", 3)
    end = next(token for token in range(CLASSES) if all(token not in row for row in rows))
    knows = oracle(whole("llama", 3), DEPTH, CLASSES)
    first = prompts(3)[0]
    always_the_end = torch.nn.functional.one_hot(torch.tensor([end] * DEPTH), CLASSES).float()
    drafter = Levels(lambda row: always_the_end if row[: len(first)] == first else knows(row))
    output, _ = decode("llama", drafter, 3, Stop(COUNT, (end,)))
    assert output == rows


@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_max_new_tokens_in_the_middle_of_a_path(count: int) -> None:
    for name in ("oracle chain", "oracle backbone"):
        output, counter = decode("llama", DRAFTERS[name]("llama", 3), 3, Stop(count))
        assert output == [row[:count] for row in reference("llama", 3)]
        assert counter.rounds == 3 * -(-count // (DEPTH + 1))


def test_a_stop_string_in_the_middle_of_a_path() -> None:
    letters = {
        letter: n for n, letter in enumerate((string.ascii_letters + string.digits)[:CLASSES])
    }
    characters = Tokenizer(models.BPE(letters, []))
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters)
    rows = reference("llama", 3)
    stop = tokenizer.decode(rows[0][6:8])
    expected = [
        generated(tiny("llama"), [row], COUNT, stop_strings=[stop], tokenizer=tokenizer)[0]
        for row in prompts(3)
    ]
    assert len(expected[0]) < COUNT
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, [stop])])
    drafter = Levels(oracle(whole("llama", 3), DEPTH, CLASSES))
    output, _ = decode("llama", drafter, 3, Stop(COUNT, criteria=criteria))
    assert output == expected


# errors


def test_an_empty_prompt_is_refused() -> None:
    ids, mask = padded([[1, 2], [], [3]])
    with pytest.raises(UserError, match="prompt 2 of 3 is empty"):
        Decoder(tiny("llama"), Nothing(None, None), GREEDY).generate(ids, mask, Stop(4))


def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    row = [1] * (CONTEXT - 5)
    decoder = Decoder(tiny("llama"), Nothing(None, None), GREEDY)
    with pytest.raises(UserError, match="at most 5 new tokens"):
        decoder.generate(*padded([row]), Stop(6))
    assert len(decoder.generate(*padded([row]), Stop(5))[0]) == 5
    with pytest.raises(UserError, match="shorten the prompt"):
        decoder.generate(*padded([row + [1] * 6]), Stop(1))


def test_the_last_positions_of_the_context_may_be_drafted_beyond() -> None:
    row = torch.randint(
        CLASSES, (CONTEXT - 8,), generator=torch.Generator().manual_seed(2)
    ).tolist()
    expected = generated(tiny("gpt2"), [row], 8)
    for drafter in (Levels(clueless(DEPTH, CLASSES)), small_model("gpt2", 0)):
        decoder = Decoder(tiny("gpt2"), drafter, GREEDY)
        assert decoder.generate(*padded([row]), Stop(8)) == expected


def test_a_greedy_verifier_does_not_sample() -> None:
    with pytest.raises(UserError, match="temperature"):
        Decoder(tiny("llama"), Nothing(None, None), GREEDY, Sampling(temperature=0.7))


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        (lambda tree: replace(tree, tokens=tree.tokens[:, 1:]), "returned tokens of a draft tree"),
        (lambda tree: replace(tree, mask=tree.mask[:1]), "returned a mask of a draft tree"),
        (
            lambda tree: replace(tree, logp=torch.zeros(1, 3, 9)),
            "returned log-probs of a draft tree",
        ),
        (lambda tree: tree.tokens, "proposed an object of type Tensor, expected a DraftTree"),
    ],
)
def test_a_drafter_whose_draft_has_another_form_is_named(wrong: Any, cause: str) -> None:
    drafter: Any = Levels(clueless(DEPTH, CLASSES))
    propose = drafter.propose
    drafter.propose = lambda *given: wrong(propose(*given))
    with pytest.raises(UserError, match=f"^the drafter Levels {cause}"):
        decode("llama", drafter, 2, Stop(4))
