"""One prompt decoded speculatively, with every tree that was proposed and what was kept of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kdcore.decoding.loop import Decoder, Stop
from kdcore.method.protocols import Verifier
from kdcore.method.records import DraftTree, Verdict
from kdcore.runs.results import Node, Replay, Round

REPLAYED = 64
"""How many tokens a replay is worth reading for."""


class _Witness:
    """A verifier that asks another one, and keeps what it last saw."""

    def __init__(self, verifier: Verifier) -> None:
        self.verifier, self.lossless = verifier, verifier.lossless

    def __call__(
        self, tree: DraftTree, logp: Callable[[Tensor], Tensor], generator: torch.Generator | None
    ) -> Verdict:
        self.tree, self.verdict = tree, self.verifier(tree, logp, generator)
        return self.verdict


def replay(
    decoder: Decoder,
    prompt: Sequence[int],
    tokenizer: Any,
    method: str,
    stop: Stop,
    seed: int = 0,
) -> Replay:
    """Decode a prompt of token ids; the decoder is spent on it.

    Raises UserError as `Decoder.stream` does.
    """
    witness = decoder.verifier = _Witness(decoder.verifier)
    device = decoder.session.model.device
    ids = torch.tensor([list(prompt)], device=device)
    generator = torch.Generator(device).manual_seed(seed)
    rounds = []
    for (emitted,) in decoder.stream(ids, torch.ones_like(ids), stop, generator):
        path = witness.verdict.path[0].tolist()[: len(emitted)]
        nodes = _nodes(witness.tree, set(path), tokenizer)
        rounds.append(Round(nodes, [tokenizer.decode([token]) for token in emitted]))
    return Replay(method, tokenizer.decode(list(prompt)), rounds)


def _nodes(tree: DraftTree, accepted: set[int], tokenizer: Any) -> list[Node]:
    """The nodes of a tree of one row, without padding."""
    parents, real = tree.shape.parents[0].tolist(), tree.mask[0].tolist()
    place = {-1: -1}
    nodes: list[Node] = []
    for n, (token, parent) in enumerate(zip(tree.tokens[0].tolist(), parents, strict=True)):
        if real[n] and parent in place:
            place[n] = len(nodes)
            nodes.append(Node(tokenizer.decode([token]), place[parent], n in accepted))
    return nodes
