"""The smallest drafter that can be trained: a matrix a level on the target's last hidden state."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

import kdcore
from kdcore.components.component import Component
from kdcore.components.hookspecs import hookimpl
from kdcore.components.registry import Registry, installed
from kdcore.decoding.tree import DraftTree, chain
from kdcore.method.logits import Head
from kdcore.models.anatomy import head_of


class Params(kdcore.Params):
    depth: int = 3
    vocabulary: int | None = None


class Matrices(nn.Module):
    layers: tuple[int, ...] = ()

    def __init__(self, params: Params, context: Any) -> None:
        super().__init__()
        self.depth, self.size = params.depth, params.vocabulary

    def bind(self, target: Any, tokenizer: Any) -> None:
        config = target.config.get_text_config()
        self.layers = (config.num_hidden_layers,)
        width = config.hidden_size
        self.levels = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(self.depth))
        self._shared = (target.get_input_embeddings(), head_of(target))
        chosen = torch.arange(self.size) if self.size else None
        self.register_buffer("vocabulary", chosen)

    @property
    def head(self) -> Head:
        whole = self._shared[1]()
        return whole if self.vocabulary is None else whole.rows(self.vocabulary)

    def choose_vocabulary(self, counts: Tensor) -> None:
        if self.size:
            self.vocabulary.copy_(counts.topk(self.size).indices.sort().values)

    def forward(self, tokens: Tensor, features: Tensor) -> Tensor:
        read = torch.cat([features, self._shared[0](tokens.roll(-1, 1))], -1)
        return torch.stack([level(read) for level in self.levels], 2)

    def start(self, first: Tensor) -> None: ...

    def propose(self, tokens: Tensor, features: Tensor, lengths: Tensor, generator: Any) -> Any:
        row, last = torch.arange(len(tokens)), (lengths - 1).clamp(min=0)
        read = torch.cat([features, self._shared[0](tokens)], -1)[row, last]
        hidden = torch.stack([level(read) for level in self.levels], 1)
        best = self.head.finish(self.head.linear(hidden)).argmax(-1)
        drafted = best if self.vocabulary is None else self.vocabulary[best]
        active = (lengths > 0)[:, None].expand_as(drafted)
        return DraftTree(drafted, chain(self.depth, tokens.device), active)


@hookimpl
def kdcore_components() -> list[Component]:
    return [
        Component(
            kind="drafter",
            name="matrices",
            build="tests.tiny.toy_drafter:Matrices",
            summary="a toy",
            source="none",
            params=Params,
        ),
    ]


def registry() -> Registry:
    """What is installed, and the toy."""
    found = Registry()
    found.plugins = list(installed().plugins)
    found._owner = dict(installed()._owner)
    found.register(sys.modules[__name__], "toy_drafter", "toys", "1.0")
    return found
