"""What drafters with weights have in common: what they share with their target, and own no part of.

That is the target's embedding, its head (the rows of the tokens that they propose), and which
tokens those are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdcore.decoding.layers.packed_weights import PackedWeights, is_for_cpu
from kdcore.errors import UserError
from kdcore.method.logits import Head
from kdcore.method.records import DraftTree
from kdcore.models.anatomy import head_of


class DraftingModule(nn.Module):
    """A `kdcore.method.protocols.TrainedDrafter` but for its own layers.

    A subclass makes its weights in ``bind``, after this class's, and adds ``layers``, ``depth``,
    ``forward``, ``start`` and ``propose``.

    Args:
        size: V', how many of the target's tokens it can propose, the most frequent; None for all.

    Attributes:
        vocabulary: [V'] int64, the rising ids of those tokens; None for all.
    """

    vocabulary: Tensor | None
    _like: Tensor

    def __init__(self, size: int | None) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("vocabulary", None)
        self.register_buffer("_like", torch.empty(0), persistent=False)
        self._target_head: Callable[[], Head] = Head
        self._rows: Head | None = None

    def bind(self, target: PreTrainedModel, tokenizer: Any) -> None:
        """Share the target's embedding and head.

        Args:
            target: The model that it drafts for.
            tokenizer: The target's; not read here.

        Raises:
            UserError: The target has no linear head, its embedding or head is not as wide as its
                layers, or it has fewer tokens than are to be proposed.
        """
        head = head_of(target)
        embedding: Any = target.get_input_embeddings()
        hidden = target.config.get_text_config().hidden_size
        name = type(target).__name__
        weight = None if head is None else head().weight
        if head is None or weight is None:
            raise UserError(
                f"{name} has no linear head, which a drafter's hidden states are read by",
                "choose a causal language model whose head is one matrix",
            )
        if {embedding.weight.shape[1], weight.shape[1]} != {hidden}:
            raise UserError(
                f"the layers of {name} are {hidden} wide, its embedding "
                f"{embedding.weight.shape[1]} and its head {weight.shape[1]}",
                "choose a target in which all three are equal",
            )
        if self.size is not None and self.size > len(weight):
            raise UserError(
                f"drafter.vocabulary is {self.size}, and the target has {len(weight)} tokens",
                "give fewer, or null for all",
            )
        # In a tuple, or torch would count the target's weights among the drafter's own.
        self._embedding = (embedding,)
        self._target_head = head
        self._rows = None
        if self.size is not None:
            self.vocabulary = torch.arange(self.size, device=target.device)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in: that of its weights, or float32 in a CPU's pass over bfloat16 ones.

        A weight itself does not tell: one that is packed stays as it is stored.
        """
        return self._like.dtype

    @property
    def head(self) -> Head:
        """From a hidden state to the logits of ``vocabulary``: the target's, frozen."""
        if self._rows is None:
            own = self._target_head()
            with torch.inference_mode(False):  # it is kept, and training reads it too
                frozen = replace(own, weight=_frozen(own.weight), bias=_frozen(own.bias))
                self._rows = frozen if self.vocabulary is None else frozen.rows(self.vocabulary)
        return self._rows

    def choose_vocabulary(self, counts: Tensor) -> None:
        """Take the most frequent tokens, of equal ones the first.

        Args:
            counts: [V] int64, how often each token is to be predicted in the training rows.
        """
        if self.vocabulary is not None:
            best = counts.sort(descending=True, stable=True).indices[: len(self.vocabulary)]
            self.vocabulary.copy_(best.sort().values)
            self._rows = None

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Take back what `state_dict` gave."""
        self._rows = None
        return super().load_state_dict(state_dict, strict, assign)

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Embed tokens as the target does.

        Args:
            tokens: [B, A] int64, the target's ids.

        Returns:
            [B, A, H], without a gradient.
        """
        embedded: Tensor = self._embedding[0](tokens)
        return embedded

    def logp(self, hidden: Tensor) -> Tensor:
        """Read the log-probs of the next token by the target's head.

        Args:
            hidden: [..., H] hidden states.

        Returns:
            [..., V'] log-probs over ``vocabulary``.
        """
        head = self.head
        own, shared = head, self._target_head()
        if _is_the_same(head.weight, shared.weight):
            own = shared  # a packing is found by its tensor, and the target has packed its own
        if torch.is_inference_mode_enabled() and own.weight is not None and is_for_cpu(own.weight):
            linear = PackedWeights([(own.weight, own.bias)])(hidden.float())
        else:
            linear = head.linear(hidden)
        return head.finish(linear).log_softmax(-1)

    def in_target(self, tree: DraftTree) -> DraftTree:
        """Put a tree's tokens in the target's own ids.

        Args:
            tree: A tree whose tokens count within ``vocabulary``.

        Returns:
            The same tree, which ``propose`` may return.
        """
        return replace(tree, tokens=self.target_ids(tree.tokens))

    def target_ids(self, tokens: Tensor) -> Tensor:
        """Put tokens in the target's own ids.

        Args:
            tokens: [...] int64, which count within ``vocabulary``.

        Returns:
            [...] int64.
        """
        return tokens if self.vocabulary is None else self.vocabulary[tokens]


def _frozen(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.detach()


def _is_the_same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two are one weight, though perhaps two tensors."""
    if one is None or other is None:
        return False
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape
