import pytest
import torch

from kdcore.decoding.loop import Decoder, Stop
from kdcore.errors import UserError
from kdcore_baselines.drafters.untrained import Ngram, SmallModel
from kdcore_baselines.drafting_components import ModelParams, NgramParams
from kdcore_baselines.trees import Backbone
from kdcore_baselines.verifiers import Greedy
from tests.tiny.targets import CLASSES, Loads, generated, padded, prompts, tiny, tokenizer_of

NO_FEATURES = torch.empty(0)


def copies(rows: list[list[int]], longest: int = 3, length: int = 4) -> list[list[int] | None]:
    """What is copied after each row, None for a row that proposes nothing."""
    drafter = Ngram(NgramParams(longest=longest, length=length), None)
    ids, mask = padded(rows, "right")
    drafter.start(ids[:, 0])
    tree = drafter.propose(ids[:, 1:], NO_FEATURES, mask.sum(1) - 1, None)
    return [
        tokens if offered[0] else None
        for tokens, offered in zip(tree.tokens.tolist(), tree.mask.tolist(), strict=True)
    ]


def test_ngram_copies_what_followed_the_longest_match_where_it_last_stood() -> None:
    assert copies([[1, 2, 3, 7, 8, 9, 3, 6, 5, 4, 1, 2, 3]]) == [[7, 8, 9, 3]]
    assert copies([[1, 2, 3, 7, 8, 9, 3, 6, 5, 4, 1, 2, 3]], longest=1) == [[6, 5, 4, 1]]
    assert copies([[5, 1, 5, 2, 5, 3, 5]], longest=1) == [[3, 5, 3, 5]]


def test_ngram_continues_a_loop_through_its_own_copy() -> None:
    assert copies([[4, 6, 6]], length=5) == [[6] * 5]
    assert copies([[4, 1, 2, 1, 2]], length=5) == [[1, 2, 1, 2, 1]]


def test_ngram_proposes_nothing_without_a_match_or_a_new_token() -> None:
    assert copies([[1, 2, 3, 4], [1], [2, 2]]) == [None, None, [2] * 4]


def test_ngram_remembers_across_rounds_for_each_row() -> None:
    drafter = Ngram(NgramParams(longest=2, length=2), None)
    drafter.start(torch.tensor([1, 9]))
    drafter.propose(torch.tensor([[2, 3], [8, 7]]), NO_FEATURES, torch.tensor([2, 1]), None)
    tree = drafter.propose(torch.tensor([[1], [9]]), NO_FEATURES, torch.tensor([1, 1]), None)
    assert tree.tokens.tolist() == [[2, 3], [8, 9]]


class Checked(SmallModel):
    """Compares each proposal with what the small model generates after the row."""

    def start(self, first) -> None:
        super().start(first)
        self.rows = [[token] for token in first.tolist()]
        self.checked = 0

    def propose(self, tokens, features, lengths, generator):
        tree = super().propose(tokens, features, lengths, generator)
        for row, new, count, draft in zip(
            self.rows, tokens.tolist(), lengths.tolist(), tree.tokens.tolist(), strict=True
        ):
            row += new[:count]
            if count:
                assert [draft] == generated(self.model, [row], self.length)
                self.checked += 1
        return tree


def test_the_small_model_keeps_its_cache_in_step_with_what_was_committed() -> None:
    # A target close to the drafter, so that every number of drafted tokens is accepted.
    target, noise = tiny("qwen2"), torch.Generator().manual_seed(3)
    near = type(target)(target.config).eval()
    near.load_state_dict(target.state_dict())
    near.generation_config = target.generation_config
    with torch.no_grad():
        for weight in near.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=noise)
    drafter = Checked(ModelParams(model="near", length=3), Loads(near))
    drafter.bind(target, tokenizer_of())
    decoder = Decoder(target, drafter, Greedy(None, None))
    emitted = [set[int]() for _ in range(3)]
    for committed in decoder.stream(*padded(prompts(3)), Stop(30)):
        for seen, tokens in zip(emitted, committed, strict=True):
            seen.add(len(tokens))
    assert drafter.checked == decoder.counter.rounds
    assert set.union(*emitted) >= {1, 2, 3, 4}


def test_a_small_model_of_another_vocabulary_is_refused() -> None:
    drafter = SmallModel(ModelParams(model="small"), Loads(tiny("llama"), classes=30))
    with pytest.raises(UserError, match="small and the target differ in 31 entries"):
        drafter.bind(tiny("llama"), tokenizer_of())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rows", [30, 80])
def test_padding_of_the_vocabulary_may_differ(rows: int, temperature: float) -> None:
    """Both know 30 tokens; the target's embedding has 61 rows, the small model's more or none."""
    target = tiny("llama")
    small = Loads(tiny("llama", vocab_size=rows), classes=30)
    drafter = SmallModel(ModelParams(model="x", length=3, temperature=temperature), small)
    drafter.bind(target, tokenizer_of(30))
    drafter.start(torch.tensor([3, 60]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        tree = drafter.propose(
            torch.tensor([[4, 1], [5, 0]]), NO_FEATURES, torch.tensor([2, 1]), generator
        )
    assert tree.tokens.max() < min(rows, CLASSES)
    if temperature:
        assert tree.logp.shape == (2, 3, CLASSES)
        assert torch.allclose(tree.logp.exp().sum(-1), torch.ones(2, 3))
    else:
        assert tree.logp is None


def test_backbone_takes_the_likeliest_at_each_depth() -> None:
    logp = torch.tensor([[[0.1, 0.3, 0.6], [0.5, 0.2, 0.3]]]).log().expand(2, -1, -1)
    tree = Backbone(k=2)(logp, torch.tensor([True, False]))
    assert tree.tokens.tolist() == [[2, 1, 0, 2]] * 2
    assert tree.shape.parents.tolist() == [[-1, -1, 0, 0]]
    assert tree.mask.tolist() == [[True] * 4, [False] * 4]
    assert tree.logp is None
