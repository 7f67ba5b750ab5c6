"""A session against the model's plain forward, which has no cache, no tree and no padding."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel

from kdcore.decoding.session import Session
from kdcore.decoding.tree import DraftTree, chain, shape_of
from kdcore.errors import UserError
from tests.tiny.targets import (
    CLASSES,
    CONTEXT,
    FAMILIES,
    attentions,
    config_of,
    padded,
    prompts,
    tiny,
)

PARENTS = [[-1, -1, 0, 0, 2, 4, 1], [-1, 0, 1, 2, 3, 4, 5], [-1, -1, -1, -1, 0, 4, -1]]
LAYERS = (1, 3, 0)


def plain(model: PreTrainedModel, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """Logits [V] after the last token, and the last token's features [F]."""
    with torch.no_grad():
        output = model(torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
    hidden = [output.hidden_states[layer][0, -1] for layer in LAYERS]
    return output.logits[0, -1], torch.cat(hidden)


def random_tree(seed: int) -> DraftTree:
    tokens = torch.randint(CLASSES, (3, 7), generator=torch.Generator().manual_seed(seed))
    return DraftTree(tokens, shape_of(torch.tensor(PARENTS)), torch.ones(3, 7, dtype=torch.bool))


def path_to(row: int, node: int) -> list[int]:
    return [] if node < 0 else [*path_to(row, PARENTS[row][node]), node]


def compare_rounds(model: PreTrainedModel, tolerance: float) -> None:
    """Three rounds over rows of different lengths, each keeping a different count per row."""
    rows = prompts(3)
    session = Session(model, LAYERS)
    session.start(3)
    ids, mask = padded([row[:-1] for row in rows], "right")
    with torch.no_grad():
        logits, features = session.extend(ids, mask.sum(1))
    for row, tokens in enumerate(rows):
        expected, expected_features = plain(model, tokens[:-1])
        assert (logits[row] - expected).abs().max() < tolerance
        last = features[row, len(tokens) - 2]
        assert (last - expected_features).abs().max() < tolerance

    for round_, ends in enumerate([(6, 6, -1), (5, -1, 3), (-1, 2, 5)]):
        tree = random_tree(round_)
        root = torch.tensor([row[-1] for row in rows])
        with torch.no_grad():
            logits = session.score(root, tree)
        for row, tokens in enumerate(rows):
            for node in range(-1, 7):
                path = [int(tree.tokens[row, n]) for n in path_to(row, node)]
                expected, _ = plain(model, tokens + path)
                assert (logits[row, 1 + node] - expected).abs().max() < tolerance

        paths = [path_to(row, end) for row, end in enumerate(ends)]
        depth = max(map(len, paths))
        padded_paths = torch.tensor([path + [-1] * (depth - len(path)) for path in paths])
        counts = torch.tensor([1 + len(path) for path in paths])
        before = [len(row) - 1 for row in rows]
        kept = session.keep(padded_paths, counts)
        for row, path in enumerate(paths):
            rows[row] = rows[row] + [int(tree.tokens[row, node]) for node in path]
            for place in range(len(path) + 1):
                _, expected = plain(model, rows[row][: before[row] + place + 1])
                assert (kept[row, place] - expected).abs().max() < tolerance
            rows[row].append(row + 1)
        assert session.lengths.tolist() == [len(row) - 1 for row in rows]


@pytest.mark.parametrize(
    ("family", "attention"),
    [(family, attention) for family in FAMILIES for attention in attentions(family)],
)
def test_scores_and_features_are_those_of_the_plain_forward(family: str, attention: str) -> None:
    compare_rounds(tiny(family, attention), tolerance=2e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bfloat16_follows_the_plain_forward_closely(attention: str) -> None:
    model = copy.deepcopy(tiny("llama", attention, initializer_range=0.1)).to(torch.bfloat16)
    compare_rounds(model, tolerance=0.06)


def test_a_cache_outgrows_its_first_storage() -> None:
    model = tiny("llama", max_position_embeddings=1024)
    row = torch.randint(CLASSES, (700,), generator=torch.Generator().manual_seed(0)).tolist()
    session = Session(model, LAYERS)
    session.start(1)
    with torch.no_grad():
        for start in range(0, 700, 100):
            tokens = torch.tensor([row[start : start + 100]])
            logits, _ = session.extend(tokens, torch.tensor([100]))
            expected, _ = plain(model, row[: start + 100])
            assert (logits[0] - expected).abs().max() < 2e-4


def test_rewinding_forgets() -> None:
    model = tiny("qwen2")
    session = Session(model)
    session.start(1)
    with torch.no_grad():
        session.extend(torch.tensor([[3, 1, 4, 1, 5]]), torch.tensor([5]))
        session.extend(torch.tensor([[9, 2, 6]]), torch.tensor([3]))
        session.rewind(torch.tensor([4]))
        logits, _ = session.extend(torch.tensor([[5, 3]]), torch.tensor([2]))
    expected, _ = plain(model, [3, 1, 4, 1, 5, 3])
    assert (logits[0] - expected).abs().max() < 2e-4


def test_a_row_that_keeps_nothing_stays_as_it_is() -> None:
    model = tiny("gpt2")
    session = Session(model)
    session.start(2)
    prompt = torch.tensor([[3, 1, 4], [1, 5, 9]])
    tree = DraftTree(torch.tensor([[7], [8]]), chain(1, prompt.device), torch.ones(2, 1).bool())
    with torch.no_grad():
        session.extend(prompt, torch.tensor([3, 3]))
        first = session.score(torch.tensor([2, 6]), tree)
        session.keep(torch.tensor([[0], [-1]]), torch.tensor([2, 0]))
        assert session.lengths.tolist() == [5, 3]
        again = session.score(torch.tensor([2, 6]), tree)
    assert (again[1] - first[1]).abs().max() < 1e-4
    assert (again[0] - first[0]).abs().max() > 1e-2


def test_nodes_beyond_the_context_do_no_harm() -> None:
    model = tiny("gpt2")
    row = list(range(40)) * 3
    session = Session(model)
    session.start(1)
    tree = DraftTree(
        torch.zeros(1, 6).long(), chain(6, torch.device("cpu")), torch.ones(1, 6).bool()
    )
    with torch.no_grad():
        session.extend(torch.tensor([row[: CONTEXT - 1]]), torch.tensor([CONTEXT - 1]))
        logits = session.score(torch.tensor([row[CONTEXT - 1]]), tree)
    expected, _ = plain(model, row[:CONTEXT])
    assert (logits[0, 0] - expected).abs().max() < 2e-4


def test_hooks_do_not_outlive_a_pass() -> None:
    model = tiny("llama")

    def hooks() -> list[tuple[int, int]]:
        """Those of each module; transformers leaves its own on a model that gave hidden states."""
        return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]

    before = hooks()
    session = Session(model, LAYERS)
    session.start(1)
    with torch.no_grad():
        session.extend(torch.tensor([[1, 2]]), torch.tensor([2]))
    assert hooks() == before


def test_training_mode_is_refused() -> None:
    model = type(tiny("llama"))(config_of("llama")).train()
    with pytest.raises(UserError, match="eval"):
        Session(model)


def test_attention_without_a_tree_mask_is_refused() -> None:
    model = type(tiny("llama"))(config_of("llama")).eval()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UserError, match="flex_attention"):
        Session(model)


def test_a_recurrent_model_is_refused() -> None:
    config = MambaConfig(vocab_size=CLASSES, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(UserError, match="recurrent"):
        Session(MambaForCausalLM(config).eval())


def test_a_layer_that_the_target_lacks_is_refused() -> None:
    with pytest.raises(UserError, match="reads hidden state 4"):
        Session(tiny("llama"), (1, 4))
