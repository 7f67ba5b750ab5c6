"""A replay of speculative decoding: each proposed tree of one prompt, and its accepted path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kdcore.decoding.loop import Decoder, Stop
from kdcore.decoding.protocols import Verifier
from kdcore.decoding.tree import DraftTree, Verdict
from kdcore.models.facts import token_texts
from kdcore.runs.results import Node, Replay, Round

REPLAYED = 64
"""Number of tokens in a replay: more would be tedious to read."""


class _Witness:
    """A wrapper of a verifier that records the last tree and verdict."""

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
    """Decode one prompt and record each round.

    Args:
        decoder: The decoder, whose verifier is replaced.
        prompt: Token ids of the prompt.
        tokenizer: The tokenizer that decodes the tokens.
        method: Name of the method in the replay.
        stop: The conditions that end the row.
        seed: Sampling seed.

    Returns:
        The replay.

    Raises:
        UserError: As for `Decoder.stream`.
    """
    witness = decoder.verifier = _Witness(decoder.verifier)
    device = decoder.session.model.device
    ids = torch.tensor([list(prompt)], device=device)
    generator = torch.Generator(device).manual_seed(seed)
    rounds = []
    for (emitted,) in decoder.stream(ids, torch.ones_like(ids), stop, generator):
        path = witness.verdict.path[0].tolist()[: len(emitted)]
        nodes = _nodes(witness.tree, set(path), tokenizer)
        rounds.append(Round(nodes, token_texts(tokenizer, emitted)))
    return Replay(method, tokenizer.decode(list(prompt)), rounds)


def _nodes(tree: DraftTree, accepted: set[int], tokenizer: Any) -> list[Node]:
    """The nodes of a tree of one row, without padding."""
    parents, real = tree.shape.parents[0].tolist(), tree.mask[0].tolist()
    place = {-1: -1}
    nodes: list[Node] = []
    for n, (token, parent) in enumerate(zip(tree.tokens[0].tolist(), parents, strict=True)):
        if real[n] and parent in place:
            place[n] = len(nodes)
            (text,) = token_texts(tokenizer, [token])
            nodes.append(Node(text, place[parent], n in accepted))
    return nodes
