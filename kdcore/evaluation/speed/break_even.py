"""The acceptance length above which a drafter makes decoding faster on this machine.

The loop decodes a prompt with and without the drafter in turn. `kdcore bench` predicts the
speed-up over plain decoding as tau * plain / (draft + verify), from the seconds of a round that the
loop counts. It is 1, and the drafter breaks even, at tau* = (draft + verify) / plain.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kdcore.decoding.loop import Counter, Decoder, Stop

TOKENS = 32
"""Maximum number of tokens of an answer."""
WARM_UP = 2
"""Number of rounds that each decoder decodes first, not counted."""
TURN = 8
"""Number of rounds after which the other decoder has its turn."""
ROUNDS = 40
"""Number of rounds of each decoder after which the measurement ends."""


@dataclass(frozen=True, slots=True)
class BreakEven:
    """The median cost of a round, with and without a drafter.

    Attributes:
        plain_ms: Milliseconds of a round of plain decoding: a pass over one token.
        draft_ms: Milliseconds of a proposal.
        verify_ms: Milliseconds in which the target scores the proposal, and the verifier verifies.
        tau: Acceptance length at which the drafter breaks even; a drafter of D levels has at most
            D + 1.
        rounds: Number of measured rounds with the drafter.
    """

    plain_ms: float
    draft_ms: float
    verify_ms: float
    tau: float
    rounds: int


def break_even(
    decoder: Decoder, plain: Decoder, prompts: Sequence[Sequence[int]], seconds: float
) -> BreakEven:
    """Measure rounds of two decoders in turn, so that other load affects both alike.

    Args:
        decoder: The decoder with the drafter, which drafts in each round from now on.
        plain: A decoder of the same target without one.
        prompts: Token ids of B prompts of one length.
        seconds: Time after which no further round is measured; each decoder has one at least.

    Returns:
        The medians over the rounds.

    Raises:
        UserError: See `Decoder.stream`.
    """
    ids = torch.tensor(prompts, device=decoder.session.model.device)
    until = time.monotonic() + seconds
    decoder.always_draft()
    for each in (decoder, plain):
        _rounds(each, ids, until, WARM_UP)
    drafted: list[Counter] = []
    single: list[Counter] = []
    while not drafted or (time.monotonic() < until and len(drafted) < ROUNDS):
        drafted += _rounds(decoder, ids, until, TURN)
        single += _rounds(plain, ids, until, TURN)
    draft = statistics.median(each.draft_seconds for each in drafted)
    verify = statistics.median(each.verify_seconds for each in drafted)
    one = statistics.median(each.draft_seconds + each.verify_seconds for each in single)
    return BreakEven(
        plain_ms=1000 * one,
        draft_ms=1000 * draft,
        verify_ms=1000 * verify,
        tau=(draft + verify) / one,
        rounds=len(drafted),
    )


def _rounds(decoder: Decoder, ids: torch.Tensor, until: float, most: int) -> list[Counter]:
    """The counts of each round of an answer but the first, whose proposal reads the prompt."""
    generator = torch.Generator(ids.device).manual_seed(0)
    found: list[Counter] = []
    # without end tokens: a random drafter or prompt may end an answer at once
    for _ in decoder.stream(ids, torch.ones_like(ids), Stop(TOKENS), generator):
        found.append(decoder.counter)
        decoder.counter = Counter()
        if len(found) > most or (len(found) > 1 and time.monotonic() > until):
            break
    return found[1:]
