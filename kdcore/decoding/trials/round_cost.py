"""The measured cost of a round of speculative decoding on this machine, used to size a tree.

The time of a target pass grows with its number of rows, at a rate that depends on the machine, the
model and the number of threads. A node pays off if its expected gain exceeds its added cost.
"""

from __future__ import annotations

import statistics
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kdcore.decoding.protocols import Drafter
from kdcore.decoding.session import Session
from kdcore.decoding.tree import DraftTree, chain
from kdcore.models.device import synchronise

ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Numbers of tokens in the timed passes, including the root."""
CONTEXT = 128
"""Number of positions before them."""
REPEATS = 5


@dataclass(frozen=True, slots=True)
class RoundCost:
    """The times of a proposal and of target passes.

    Attributes:
        draft: Seconds of a proposal.
        rows: Numbers of rows of the measured passes, in increasing order.
        verify: Seconds of these passes.
    """

    draft: float
    rows: tuple[int, ...]
    verify: tuple[float, ...]

    def __call__(self, rows: int) -> float:
        """The cost of a round, by linear interpolation between the measured passes.

        Beyond the last pass, the line through the last two continues; a falling line, which is a
        measurement error, continues flat, so that the cost cannot become negative.

        Args:
            rows: Number of rows in the target pass, including the roots.

        Returns:
            Seconds, those of a proposal included.
        """
        right = min(max(bisect_right(self.rows, rows), 1), len(self.rows) - 1)
        left = right - 1
        share = (rows - self.rows[left]) / (self.rows[right] - self.rows[left])
        rise = self.verify[right] - self.verify[left]
        return self.draft + self.verify[left] + share * (rise if share <= 1 else max(rise, 0.0))


@torch.inference_mode()
def measured_cost(session: Session, drafter: Drafter) -> RoundCost:
    """Measure the median times of alternating passes over pseudo-random tokens.

    Args:
        session: A session of the target; it is reset.
        drafter: A drafter that is bound to the target; its state is reset.

    Returns:
        The cost of a round.
    """
    target = session.model
    vocabulary = target.config.get_text_config().vocab_size
    device = target.device
    # A pass may exceed the context: `Session` then clamps its positions.
    context = min(CONTEXT, max(2, (session.limit or CONTEXT + ROWS[-1]) - ROWS[-1]))
    prompt = (torch.arange(context, device=device) * 997 % vocabulary)[None]
    session.start(1)
    _, features = session.extend(prompt, torch.tensor([context], device=device))
    one = torch.ones(1, dtype=torch.int64, device=device)
    drafter.start(prompt[:, 0])
    drafter.propose(prompt[:, 1:], features[:, :-1], one * (context - 1), None)

    # each time another token, since a drafter may know what followed one that it has read
    later = torch.arange(context, context + 1 + REPEATS, device=device)
    unread = iter((later * 997 % vocabulary)[:, None].split(1))

    def propose() -> None:
        drafter.propose(next(unread), features[:, -1:], one, None)

    def score(rows: int) -> Callable[[], Any]:
        shape = chain(rows - 1, device)
        nodes = prompt[:, :1].expand(1, rows - 1)
        tree = DraftTree(nodes, shape, torch.ones_like(nodes, dtype=torch.bool))
        return lambda: session.score(prompt[:, -1], tree)

    def forget() -> None:
        session.keep(prompt[:, :0], one * 0)
        session.compact()

    passes = [propose, *(score(rows) for rows in ROWS)]
    seconds: list[list[float]] = [[] for _ in passes]
    with session.serving():
        for _ in range(1 + REPEATS):
            for each, taken in zip(passes, seconds, strict=True):
                began = time.perf_counter()
                each()
                synchronise(device)
                taken.append(time.perf_counter() - began)
                if each is not propose:
                    forget()
    draft, *verify = (statistics.median(taken[1:]) for taken in seconds)  # the first warms up
    return RoundCost(draft, ROWS, tuple(verify))
