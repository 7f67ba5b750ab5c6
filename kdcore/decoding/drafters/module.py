"""The base module of drafters with weights, which share the target's embedding and head.

A drafter may propose a subset of the target's tokens; the head then has the rows of that subset.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdcore.decoding.tree import DraftTree
from kdcore.errors import UserError
from kdcore.method.logits import Head
from kdcore.models.anatomy import head_of
from kdcore.models.features import FeatureTap


class DraftingModule(nn.Module):
    """A `kdcore.decoding.protocols.TrainedDrafter` without its own layers.

    A subclass creates its weights in ``bind``, after this class, calls `read_states` there if it
    reads hidden states of the target, and adds ``depth``, ``forward``, ``start`` and ``propose``.

    Args:
        size: Size V' of the draft vocabulary, the most frequent tokens; None means all tokens.

    Attributes:
        layers: Indices of the target's hidden states that it reads.
        vocabulary: [V'] int64 ids of the tokens that it can propose, or None for all.
    """

    layers: tuple[int, ...] = ()
    vocabulary: Tensor | None

    def __init__(self, size: int | None) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("vocabulary", None)
        self._target_head: Callable[[], Head] = Head
        self._rows: Head | None = None

    def bind(self, target: PreTrainedModel, tokenizer: Any) -> None:
        """Share the target's embedding and head.

        Args:
            target: The target model.
            tokenizer: Not used.

        Raises:
            UserError: The target does not have a linear head, its embedding or head differs in
                width from its layers, or it has fewer tokens than the draft vocabulary.
        """
        head = head_of(target)
        embedding: Any = target.get_input_embeddings()
        hidden = target.config.get_text_config().hidden_size
        name = type(target).__name__
        weight = None if head is None else head().weight
        if head is None or weight is None:
            raise UserError(
                f"{name} does not have a linear head, which the drafter needs for its logits",
                "choose a causal language model with a linear head",
            )
        if {embedding.weight.shape[1], weight.shape[1]} != {hidden}:
            raise UserError(
                f"the layers of {name} have width {hidden}, but its embedding has width "
                f"{embedding.weight.shape[1]} and its head has width {weight.shape[1]}",
                "choose a target in which all three widths are equal",
            )
        if self.size is not None and self.size > len(weight):
            raise UserError(
                f"drafter.vocabulary is {self.size}, but the target has {len(weight)} tokens",
                f"set drafter.vocabulary to at most {len(weight)}, or to null for all tokens",
                "drafter.vocabulary",
            )
        # A tuple keeps torch from registering the target's weights as the drafter's.
        self._embedding = (embedding,)
        self._target_head = head
        self._rows = None
        if self.size is not None:
            self.vocabulary = torch.arange(self.size, device=target.device)

    def read_states(self, target: PreTrainedModel, layers: tuple[int, ...]) -> nn.ModuleList:
        """Set ``layers``.

        Args:
            target: The target model.
            layers: Indices of its hidden states.

        Returns:
            The layers of the target.

        Raises:
            UserError: The target does not have one of these hidden states.
        """
        self.layers = layers
        return FeatureTap(target, layers).blocks

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its weights, which ``bind`` creates."""
        return next(self.parameters()).dtype

    @property
    def head(self) -> Head:
        """The frozen head of the target, with the rows of ``vocabulary``."""
        if self._rows is None:
            own = self._target_head()
            with torch.inference_mode(False):  # training uses the same tensors later
                frozen = replace(own, weight=_frozen(own.weight), bias=_frozen(own.bias))
                self._rows = frozen if self.vocabulary is None else frozen.rows(self.vocabulary)
        return self._rows

    def head_rows(self) -> Tensor:
        """The initial weights of a head of the drafter's own.

        Returns:
            [V', H] rows of the target's head for ``vocabulary``, with its scale.
        """
        whole = self._target_head()
        head = whole if self.vocabulary is None else whole.rows(self.vocabulary)
        assert head.weight is not None  # bind refuses a target without a linear head
        return head.weight.detach() * head.scale

    def choose_vocabulary(self, counts: Tensor) -> None:
        """Set the draft vocabulary to the most frequent tokens.

        Args:
            counts: [V] int64 frequency of each token; of equal ones, the lower id wins.
        """
        if self.vocabulary is not None:
            best = counts.sort(descending=True, stable=True).indices[: len(self.vocabulary)]
            self.vocabulary.copy_(best.sort().values)
            self._rows = None

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load the weights; see ``torch.nn.Module.load_state_dict``."""
        self._rows = None
        return super().load_state_dict(state_dict, strict, assign)

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Embed tokens with the target's embedding.

        Args:
            tokens: [B, A] int64 token ids.

        Returns:
            [B, A, H] embeddings.
        """
        embedded: Tensor = self._embedding[0](tokens)
        return embedded

    @torch.no_grad()
    def mean_embedding(self) -> Tensor:
        """The mean [H] float32 of the embeddings of all tokens."""
        weight: Tensor = self._embedding[0].weight
        return weight.float().mean(0)

    def logp(self, hidden: Tensor) -> Tensor:
        """The log-probs of hidden states.

        Args:
            hidden: [..., H] hidden states.

        Returns:
            [..., V'] log-probs over the draft vocabulary.
        """
        head = self.head
        return head.finish(head.linear(hidden)).log_softmax(-1)

    def in_target(self, tree: DraftTree) -> DraftTree:
        """Convert the tokens of a tree to the target's ids.

        Args:
            tree: A tree whose tokens are indices into ``vocabulary``.

        Returns:
            The same tree, which ``propose`` may return.
        """
        return replace(tree, tokens=self.target_ids(tree.tokens))

    def target_ids(self, tokens: Tensor) -> Tensor:
        """Convert draft-vocabulary indices to the target's ids.

        Args:
            tokens: [...] int64 indices into ``vocabulary``.

        Returns:
            [...] int64.
        """
        return tokens if self.vocabulary is None else self.vocabulary[tokens]


def _frozen(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.detach()
