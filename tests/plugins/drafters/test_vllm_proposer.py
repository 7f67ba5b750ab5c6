"""The adapter for vLLM, with stand-ins for what vLLM would do: a batch, a target, a context.

Its hidden states, its batches and its refusals are made here; vLLM itself was never run.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdcore.errors import UserError
from kdcore_fasteagle.vllm_proposer import FOLDER, FastEagleProposer
from tests.tiny.targets import tiny
from tests.tiny.trained_drafters import bound

DEPTH, MOST, POSITIONS = 3, 2, 30


def config(**changes: Any) -> Any:
    """As much of a VllmConfig as is read; changes: by the path's last name."""
    values = {
        "model": "target",
        "max_model_len": POSITIONS,
        "enforce_eager": True,
        "num_speculative_tokens": MOST,
        "max_num_seqs": 3,
        "world_size": 1,
        "additional_config": {FOLDER: "drafter"},
    } | changes

    def part(*names: str) -> SimpleNamespace:
        return SimpleNamespace(**{name: values[name] for name in names if name in values})

    return SimpleNamespace(
        model_config=part("model", "max_model_len", "enforce_eager"),
        speculative_config=part("num_speculative_tokens"),
        scheduler_config=part("max_num_seqs"),
        parallel_config=part("world_size"),
        additional_config=values["additional_config"],
    )


class Layer(nn.Module):
    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Adds in place, as a fused norm does: what is heard must be a copy."""
        residual = torch.zeros_like(hidden_states) if residual is None else residual
        residual += hidden_states
        hidden_states *= 0
        return hidden_states + 0.1 * positions[:, None] + 0.01 * residual, residual


class Target(nn.Module):
    """A target whose layers are called as vLLM calls a Llama's, over tokens of many requests."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.metadata: Any = None

    def forward(self, tokens: Tensor, positions: Tensor, starts: Tensor | None) -> list[Tensor]:
        """The hidden states 0 ... L - 1 of each token, as they are."""
        each = SimpleNamespace(query_start_loc=starts)
        self.metadata = {"other": SimpleNamespace(), "layer": each}
        hidden, residual = torch.stack([tokens * 0.1] * 32, dim=1).sin(), None
        states = []
        for layer in self.model.layers:
            states.append(hidden.clone() if residual is None else hidden + residual)
            hidden, residual = layer(positions, hidden, residual)
        return states


class Engine:
    """Passes over a batch of requests, as vLLM makes them; each is a list of its tokens."""

    def __init__(self, **changes: Any) -> None:
        torch.manual_seed(0)
        self.drafter = bound("fasteagle", tiny("llama"), depth=DEPTH, ffn=20, features=(0, 1, 2))
        self.target = Target()
        self.proposer = FastEagleProposer(config(**changes))
        context = lambda: SimpleNamespace(attn_metadata=self.target.metadata)  # noqa: E731
        self.proposer.attach(self.drafter, self.target, context)

    def run(self, batch: Mapping[str, tuple[list[int], int, int, list[int]]]) -> list[list[int]]:
        """By request: its tokens, the first position of this pass, refused drafts behind, sampled.

        The pass runs over all tokens from ``first`` to the newest but those just sampled, then
        over the refused drafts; a few tokens of padding stand at the end.
        """
        ids, places, starts = [], [], [0]
        for tokens, first, refused, _ in batch.values():
            new = tokens[first:-1] + [60] * refused
            ids += new
            places += range(first, first + len(new))
            starts.append(len(ids))
        flat = [torch.tensor([*each, 0, 0]) for each in (ids, places)]
        self.target(*flat, torch.tensor(starts))
        table = torch.full((len(batch) + 1, POSITIONS + 1), -1)
        for row, (tokens, *_) in enumerate(batch.values()):
            table[row, : len(tokens)] = torch.tensor(tokens)
        counts = [len(tokens) for tokens, *_ in batch.values()] + [0]
        return self.proposer.propose(
            [sampled for *_, sampled in batch.values()], counts, table.numpy(), slot_mappings=None
        )

    @torch.no_grad()
    def own(self, tokens: list[int]) -> list[int]:
        """The likeliest of each level that kdcore's `propose` gives for the whole request."""
        known = torch.tensor(tokens)
        positions = torch.arange(len(tokens) - 1)
        features = torch.cat(self.target(known[:-1], positions, None), dim=-1)[None]
        self.drafter.start(torch.zeros(1))
        tree = self.drafter.propose(
            known[None, 1:], features, torch.tensor([len(tokens) - 1]), None
        )
        best: list[int] = tree.tokens[0].unflatten(0, (DEPTH, -1))[:MOST, 0].tolist()
        return best


A, B, C = ([(7 * place + start) % 59 for place in range(14)] for start in (1, 2, 3))


def test_drafts_are_those_of_kdcore_whatever_was_refused() -> None:
    engine = Engine()
    assert engine.run({"a": (A[:6], 0, 0, [A[5]])}) == [engine.own(A[:6])]
    drafts = engine.run({"b": (B[:4], 0, 0, [B[3]]), "a": (A[:7], 5, 2, [A[6]])})
    assert drafts == [engine.own(B[:4]), engine.own(A[:7])]
    drafts = engine.run({"a": (A[:10], 6, 0, A[7:10]), "b": (B[:6], 3, 1, B[4:6])})
    assert drafts == [engine.own(A[:10]), engine.own(B[:6])]


def test_a_prompt_read_in_pieces_gets_a_draft_when_it_is_read() -> None:
    engine = Engine()
    # vLLM knows the whole prompt's tokens from the start, and runs over some of them
    starts = torch.tensor([0, 4])
    engine.target(torch.tensor(A[:4]), torch.arange(4), starts)
    assert engine.proposer.propose([[]], [9], torch.tensor([A[:9]]).numpy()) == [[]]
    assert engine.run({"a": (A[:10], 4, 0, [A[9]])}) == [engine.own(A[:10])]


def test_a_request_with_rows_never_heard_gets_no_draft_and_others_do() -> None:
    engine = Engine()
    drafts = engine.run({"cached": (C[:9], 4, 0, [C[8]]), "a": (A[:6], 0, 0, [A[5]])})
    assert drafts == [[], engine.own(A[:6])]
    other = [*A[:5], 58, 57]  # not the request whose rows were read, though as long
    assert engine.run({"other": (other, 5, 0, [57])}) == [[]]


def test_one_that_is_read_again_from_its_start_begins_anew() -> None:
    engine = Engine()
    engine.run({"a": (A[:6], 0, 0, [A[5]])})
    assert engine.run({"a": (A[:8], 0, 0, [A[7]])}) == [engine.own(A[:8])]
    assert engine.run({"a": (A[:9], 7, 1, [A[8]])}) == [engine.own(A[:9])]


def test_equal_requests_side_by_side() -> None:
    engine = Engine()
    engine.run({"one": (A[:6], 0, 0, [A[5]]), "two": (A[:6], 0, 0, [A[5]])})
    drafts = engine.run({"one": (A[:7], 5, 0, [A[6]]), "two": (A[:8], 5, 0, A[6:8])})
    assert drafts == [engine.own(A[:7]), engine.own(A[:8])]


def test_a_cached_prefix_is_not_taken_from_a_request_of_the_same_pass() -> None:
    engine = Engine()
    drafts = engine.run({"read": (A[:5], 0, 0, [A[4]]), "cached": (A[:6], 4, 0, [A[5]])})
    assert drafts == [engine.own(A[:5]), []]


def test_those_least_lately_heard_are_forgotten() -> None:
    engine = Engine(max_num_seqs=1)
    engine.run({"a": (A[:6], 0, 0, [A[5]])})
    engine.run({"b": (B[:6], 0, 0, [B[5]])})
    assert engine.run({"a": (A[:7], 5, 0, [A[6]])}) == [[]]
    assert engine.run({"b": (B[:7], 5, 0, [B[6]])}) == [engine.own(B[:7])]


def test_no_draft_goes_beyond_the_positions_that_the_engine_has() -> None:
    engine = Engine(max_model_len=8)
    drafts = engine.run({"a": (A[:7], 0, 0, [A[6]]), "b": (B[:6], 0, 0, [B[5]])})
    assert drafts == [[], engine.own(B[:6])[:1]]


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"enforce_eager": False}, "compiles"),
        ({"world_size": 2}, "2 workers"),
        ({"additional_config": {}}, "does not name the drafter's folder"),
        ({"additional_config": None}, "does not support this version of vLLM"),
    ],
)
def test_settings_under_which_nothing_is_heard_are_refused(
    changes: dict[str, Any], cause: str
) -> None:
    with pytest.raises(UserError, match=cause):
        FastEagleProposer(config(**changes))


def test_another_config_is_refused() -> None:
    other = config()
    del other.model_config.enforce_eager
    with pytest.raises(UserError, match="enforce_eager"):
        FastEagleProposer(other)


def test_a_target_without_the_layers_is_refused() -> None:
    proposer = FastEagleProposer(config())
    drafter = bound("fasteagle", tiny("llama"), depth=1, features=(1, 3))
    for target in (Target(3), nn.Linear(2, 2)):
        with pytest.raises(UserError, match="does not have the layers"):
            proposer.attach(drafter, target, lambda: None)


def test_a_pass_that_says_nothing_of_its_requests_is_refused() -> None:
    engine = Engine()
    engine.target(torch.tensor(A[:5]), torch.arange(5), None)
    with pytest.raises(UserError, match="the start of each request"):
        engine.proposer.propose([[A[5]]], [6], torch.tensor([A[:6]]).numpy())


def test_layers_called_otherwise_are_refused() -> None:
    engine = Engine()
    with pytest.raises(UserError, match="without 'hidden_states'"):
        engine.target.model.layers[0](torch.arange(3))


def test_positions_of_images_are_refused() -> None:
    engine = Engine()
    with pytest.raises(UserError, match="more than one position"):
        engine.target(torch.tensor(A[:5]), torch.arange(5).expand(3, 5), None)


def test_a_missing_vllm_is_said_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr("kdcore_fasteagle.vllm_proposer.load_for_serving", lambda *given: None)
    with pytest.raises(UserError, match="vLLM cannot be imported"):
        FastEagleProposer(config(model=str(tmp_path))).load_model(nn.Linear(2, 2))
