"""The shaped distribution against the scores that transformers' generate samples from."""

import pytest
import torch
from transformers import (
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from kdcore.decoding.loop import Decoder, Stop
from kdcore.decoding.sampling import Sampling, draw
from kdcore.decoding.tree import Verdict
from kdcore.testing.decoding.draft_trees import p_value
from kdcore_baselines.verifiers import Greedy
from tests.tiny.drafters import Levels, clueless, oracle
from tests.tiny.targets import CLASSES, generated, padded, prompts, tiny

COUNT = 12
DEPTH = 3
SETTINGS = [
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.8},
    {"repetition_penalty": 1.7},
    {"min_p": 0.2},
    {"typical_p": 0.6},
    {"no_repeat_ngram_size": 2},
    {"bad_words_ids": [[n, n + 1] for n in range(40)] + [[n] for n in range(9)]},
    {"sequence_bias": [[[n, n + 1], 4.0] for n in range(40)], "repetition_penalty": 1.3},
    {"temperature": 1.6, "top_k": 30, "top_p": 0.9, "repetition_penalty": 1.3},
]


class Recorder:
    """Accepts all of the oracle's chain and keeps the log-probs of every slot."""

    lossless = False

    def __init__(self, sequences: list[list[int]]) -> None:
        self.sequences = sequences
        self.seen: list[list[torch.Tensor]] = [[] for _ in sequences]
        self.places = [len(prompt) for prompt in prompts(len(sequences))]

    def __call__(self, tree, logp, generator) -> Verdict:
        rows, nodes = tree.tokens.shape
        every = logp(torch.arange(1 + nodes).expand(rows, -1))
        path = torch.where(tree.mask, torch.arange(nodes), -1)
        token = torch.zeros(rows, dtype=torch.int64)
        for row, accepted in enumerate(tree.mask.sum(1).tolist()):
            self.seen[row] += every[row, : accepted + 1].unbind()
            self.places[row] += accepted + 1
            token[row] = self.sequences[row][self.places[row] - 1]
        return Verdict(path, token)


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-6])
def test_the_coldest_sampling_is_greedy(temperature: float) -> None:
    logits = torch.tensor([[-300.0, 200.0, 199.0], [-7.0, -3.0, -5.0]])
    logp = Sampling(temperature).logp(logits, lambda: torch.zeros(2, 0))
    torch.testing.assert_close(logp.exp(), torch.eye(3)[[1, 1]])


def shaping(settings: dict) -> Sampling:
    """The settings by their names in generate, some of which are processors here."""
    processors = {
        "no_repeat_ngram_size": NoRepeatNGramLogitsProcessor,
        "bad_words_ids": NoBadWordsLogitsProcessor,
        "sequence_bias": SequenceBiasLogitsProcessor,
    }
    ordered = tuple(make(settings[name]) for name, make in processors.items() if name in settings)
    others = {name: each for name, each in settings.items() if name not in processors}
    return Sampling(**({"temperature": 1.0, "processors": ordered} | others))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_slot_has_the_distribution_that_generate_samples_from(settings: dict) -> None:
    model = tiny("llama")
    expected, sequences = [], []
    for seed, prompt in enumerate(prompts(3)):
        torch.manual_seed(seed)
        ids, mask = padded([prompt])
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=COUNT,
            do_sample=True,
            output_scores=True,
            return_dict_in_generate=True,
            **({"top_k": 0} | settings),
        )
        expected.append(torch.cat(output.scores).softmax(-1))
        sequences.append(output.sequences[0].tolist())

    recorder = Recorder(sequences)
    drafter = Levels(oracle(sequences, DEPTH, CLASSES))
    decoder = Decoder(model, drafter, recorder, shaping(settings))
    output = decoder.generate(*padded(prompts(3)), Stop(COUNT))
    assert [a + b for a, b in zip(prompts(3), output, strict=True)] == sequences
    for seen, probs in zip(recorder.seen, expected, strict=True):
        assert (torch.stack(seen).exp() - probs).abs().max() < 1e-4


PENALTIES = {"presence_penalty": 0.4, "frequency_penalty": 0.7}


@pytest.mark.parametrize("drafted", [True, False])
def test_presence_and_frequency_penalties_count_the_answer(drafted: bool) -> None:
    """The definition of the OpenAI API, in float64, with plain passes of the model."""
    model, expected = tiny("llama"), []
    for prompt in prompts(3):
        row = list(prompt)
        while len(row) < len(prompt) + COUNT:
            with torch.no_grad():
                logits = model(torch.tensor([row])).logits[0, -1].double()
            counts = torch.bincount(torch.tensor(row[len(prompt) :]).long(), minlength=CLASSES)
            row.append(int((logits - 0.7 * counts - 0.4 * (counts > 0)).argmax()))
        expected.append(row[len(prompt) :])
    assert expected != generated(model, prompts(3), COUNT)
    whole = [a + b for a, b in zip(prompts(3), expected, strict=True)]
    drafter = Levels(oracle(whole, DEPTH, CLASSES)) if drafted else Levels(clueless(DEPTH, CLASSES))
    decoder = Decoder(model, drafter, Greedy(None, None), Sampling(**PENALTIES))
    assert decoder.generate(*padded(prompts(3)), Stop(COUNT)) == expected


def test_no_end_token_before_the_minimum_length() -> None:
    model, ends = tiny("llama"), tuple(range(3, CLASSES, 2))
    given = {"eos_token_id": list(ends), "min_new_tokens": 5}
    expected = [generated(model, [prompt], COUNT, **given)[0] for prompt in prompts(3)]
    drafter = Levels(clueless(DEPTH, CLASSES))
    sampling = Sampling(min_new_tokens=5, ends=ends)
    decoder = Decoder(model, drafter, Greedy(None, None), sampling)
    output = decoder.generate(*padded(prompts(3)), Stop(COUNT, ends))
    assert output == [row[: len(own)] for row, own in zip(expected, output, strict=True)]
    assert all(len(row) > 5 for row in output) and any(len(row) < COUNT for row in output)


def test_a_repetition_penalty_acts_on_greedy_decoding() -> None:
    model = tiny("llama")
    expected = [
        generated(model, [prompt], COUNT, repetition_penalty=1.7)[0] for prompt in prompts(3)
    ]
    assert expected != generated(model, prompts(3), COUNT)
    whole = [a + b for a, b in zip(prompts(3), expected, strict=True)]
    drafter = Levels(oracle(whole, DEPTH, CLASSES))
    decoder = Decoder(model, drafter, Greedy(None, None), Sampling(repetition_penalty=1.7))
    assert decoder.generate(*padded(prompts(3)), Stop(COUNT)) == expected
    assert decoder.counter.tau == DEPTH + 1


def test_temperature_0_is_certain() -> None:
    logp = Sampling(top_k=3).logp(torch.tensor([[1.0, 4.0, 2.0]]), lambda: None)
    assert logp.exp().tolist() == [[0, 1, 0]]


def test_draw_takes_no_zero_even_at_the_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.zeros(shape))
    assert draw(torch.tensor([0.0, 0.0, 0.5, 0.5]), None) == 2


def test_draw_follows_the_weights_and_never_takes_a_zero() -> None:
    weights = torch.tensor([0.0, 3.0, 0.0, 1.0, 2.0, 0.0])
    drawn = draw(weights.expand(100_000, -1), torch.Generator().manual_seed(0))
    counts = dict(enumerate(torch.bincount(drawn, minlength=6).tolist()))
    assert p_value(counts, dict(enumerate((weights / 6).tolist()))) > 1e-3
    wrong = dict(enumerate(((weights + torch.tensor([0, 0.1, 0, -0.1, 0, 0])) / 6).tolist()))
    assert p_value(counts, wrong) < 1e-6
    assert p_value({0: 10}, {0: 1.0, 1: 0.0}) == 1.0  # what is certain fits
