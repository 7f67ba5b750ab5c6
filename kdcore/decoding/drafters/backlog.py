"""Committed tokens that a drafter has not read yet, while the loop decodes without it."""

from __future__ import annotations

import torch
from torch import Tensor


class Backlog:
    """The tokens of B rows since the last proposal, with the features before each.

    `kdcore.decoding.protocols.Drafter.propose` takes any number of tokens, so a drafter that was
    not asked for a while catches up in its next pass.
    """

    def __init__(self) -> None:
        self._rounds: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, tokens: Tensor, features: Tensor, lengths: Tensor) -> None:
        """Append the tokens of a round.

        Args:
            tokens: [B, A] int64, right-padded.
            features: [B, A, F] of the positions before them; nobody may write to it afterwards.
            lengths: [B] int64, the number of real tokens of each row.
        """
        self._rounds.append((tokens, features, lengths))

    def take(self, going: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Remove all tokens.

        Args:
            going: [B] bool; the other rows are done, and get none.

        Returns:
            Tokens [B, A], features [B, A, F] and lengths [B], right-padded. After a single round
            they are as they were added.
        """
        rounds, self._rounds = self._rounds, []
        if len(rounds) == 1:
            return rounds[0]
        tokens, features = (torch.cat(each, dim=1) for each in list(zip(*rounds, strict=True))[:2])
        real = torch.cat(
            [
                torch.arange(each.shape[1], device=each.device) < lengths[:, None]
                for each, _, lengths in rounds
            ],
            dim=1,
        )
        real &= going[:, None]
        order = torch.argsort(~real, dim=1, stable=True)
        features = features.gather(1, order[:, :, None].expand_as(features))
        return tokens.gather(1, order), features, real.sum(1)
