"""The loop of speculative decoding: propose, score, verify, keep, until every row is done."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteriaList

from kdcore.decoding.drafters.backlog import Backlog
from kdcore.decoding.engines.protocols import Engine
from kdcore.decoding.protocols import Drafter, Verifier
from kdcore.decoding.sampling import Sampling, ShapedLogits, Shaping
from kdcore.decoding.session import Session
from kdcore.decoding.tree import DraftTree, Verdict, undrafted, well_formed
from kdcore.decoding.trials.drafting_account import DraftingAccount
from kdcore.decoding.trials.round_cost import measured_cost
from kdcore.decoding.trials.tree_probe import refuse_unfaithful
from kdcore.errors import UserError
from kdcore.models.device import Moment
from kdcore.models.facts import not_finite, refuse_crossing


@dataclass(frozen=True, slots=True)
class Stop:
    """The conditions that end a row: its length, an end token, or a stopping criterion.

    Attributes:
        max_new_tokens: Maximum number of emitted tokens.
        end: Ids of end tokens, which are emitted too.
        criteria: Stopping criteria of transformers (e.g. stop strings), called after each token
            with the row's tokens [1, L] and without scores.
    """

    max_new_tokens: int
    end: tuple[int, ...] = ()
    criteria: StoppingCriteriaList | None = None


@dataclass(slots=True)
class Counter:
    """Counts of rounds and tokens, and the time they took.

    Attributes:
        rounds: Number of verifications of rows that were not done.
        emitted: Number of emitted tokens.
        accepted: Number of rounds for each number of accepted nodes.
        draft_seconds: Time for proposals.
        verify_seconds: Time for scoring and verification.
        undrafted: Number of rounds without a draft: the drafter was not asked, or had none.
    """

    rounds: int = 0
    emitted: int = 0
    accepted: dict[int, int] = field(default_factory=dict)
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    undrafted: int = 0

    def count(self, emitted: list[int], accepted: list[int], drafted: bool) -> None:
        """Count a round.

        Args:
            emitted: Number of tokens of each row that was not done.
            accepted: How many of them were drafted: all but the bonus token, or all of them when a
                drafted one ends the row.
            drafted: Whether the pass had nodes.
        """
        self.rounds += len(emitted)
        self.undrafted += 0 if drafted else len(emitted)
        self.emitted += sum(emitted)
        for nodes in accepted:
            self.accepted[nodes] = self.accepted.get(nodes, 0) + 1

    @property
    def tau(self) -> float:
        """Acceptance length: tokens per verification with the bonus; 1 for plain decoding."""
        return self.emitted / self.rounds if self.rounds else 0.0


class Decoder:
    """Speculative decoding with a target and a drafter that is bound to it.

    Args:
        target: The target in eval mode.
        drafter: A drafter that is bound to it.
        verifier: The verifier.
        sampling: The shaping of the target's logits (default: greedy).
        engine: An engine that is bound to the target and the drafter's layers (default: a new
            `kdcore.decoding.engines.torch_engine.TorchEngine`).
        account: An account by which rounds are decoded without drafts (default: that of the tree).

    Attributes:
        sampling: The shaping of the target's logits.
        session: The session of the target.
        drafter: The drafter.
        verifier: The verifier.
        counter: Counts over all calls.
        account: The account, or None to draft in each round.

    Raises:
        UserError: As for `refuse_unsuited`, or the target gives other logits for a draft tree than
            for plain text.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        drafter: Drafter,
        verifier: Verifier,
        sampling: Shaping | None = None,
        engine: Engine | None = None,
        account: DraftingAccount | None = None,
    ) -> None:
        self.sampling: Shaping = sampling or Sampling()
        tree = getattr(drafter, "tree", None)
        refuse_unsuited(verifier, self.sampling, tree)
        self.session = Session(target, drafter.layers, engine)
        refuse_unfaithful(target)
        self.drafter, self.verifier = drafter, verifier
        self.counter = Counter()
        self.account: DraftingAccount | None = account or getattr(tree, "account", None)
        tune = getattr(tree, "tune", None)
        if tune is not None:
            tune(lambda: measured_cost(self.session, drafter))

    def always_draft(self) -> None:
        """Ask the drafter in each round, from now on: to measure its drafts, not to be fast."""
        self.account = None
        tree: Any = getattr(self.drafter, "tree", None)
        if hasattr(tree, "account"):
            tree.account = None

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        stop: Stop,
        generator: torch.Generator | None = None,
    ) -> list[list[int]]:
        """Decode prompts to the end; see `stream` for the arguments and errors.

        Args:
            input_ids: [B, T] int64 prompts.
            attention_mask: [B, T], 1 for real tokens.
            stop: The conditions that end a row.
            generator: Generator on the target's device.

        Returns:
            The new tokens of each row.
        """
        rows: list[list[int]] = [[] for _ in input_ids]
        for emitted in self.stream(input_ids, attention_mask, stop, generator):
            for row, tokens in zip(rows, emitted, strict=True):
                row.extend(tokens)
        return rows

    @torch.inference_mode()
    def stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        stop: Stop,
        generator: torch.Generator | None = None,
    ) -> Iterator[list[list[int]]]:
        """Decode prompts round by round.

        Args:
            input_ids: [B, T] int64 prompts, padded on either side.
            attention_mask: [B, T], 1 for real tokens.
            stop: The conditions that end a row.
            generator: Generator on the target's device (default: torch's own).

        Yields:
            The tokens that a round commits for each row; empty for a row that is done.

        Raises:
            UserError: A prompt is empty or too long for the context, or decoding could cross the
                factors of LongRoPE (`kdcore.models.facts.refuse_crossing`), or the target gives NaN
                or infinite logits, or the drafter no draft tree of these rows.
        """
        prompt, lengths = _left_aligned(input_ids, attention_mask)
        with self.session.serving():
            yield from self._rounds(prompt, lengths, stop, generator)

    def _rounds(
        self, prompt: Tensor, lengths: Tensor, stop: Stop, generator: torch.Generator | None
    ) -> Iterator[list[list[int]]]:
        self._check(sizes := lengths.tolist(), stop)
        # one more column takes what does not fit in a row
        room = prompt.new_zeros(len(prompt), stop.max_new_tokens + 1)
        committed = torch.cat([prompt, room], dim=1)
        left = torch.full_like(lengths, stop.max_new_tokens)
        prompts = lengths
        self.drafter.start(prompt[:, 0])
        account, backlog = self.account, Backlog()
        by = f"the drafter {type(self.drafter).__name__}"
        if account is not None:
            account.start(len(prompt))
        self.session.start(len(prompt), committed.shape[1])
        # The newest token of a row, its root, runs with the tree, so the prefill omits it.
        features = self.session.read(prompt[:, :-1], lengths - 1)
        backlog.add(prompt[:, 1:], features, lengths - 1)
        ends = torch.tensor(stop.end, dtype=prompt.dtype, device=prompt.device)
        waiting = [stop.max_new_tokens > 0 for _ in prompt]
        while any(waiting):
            began = Moment(left.device)
            asked = account is None or account.asks()
            if asked:
                proposal = self.drafter.propose(*backlog.take(left > 0), generator)
                tree = well_formed(proposal, len(left), by)
            else:
                tree = undrafted(len(left), left.device)
            proposed = Moment(left.device)
            tree = _no_deeper(tree, left - 1)
            root = committed.gather(1, lengths[:, None] - 1).squeeze(1)
            logits = self.session.score(root, tree)
            going = left > 0
            shaped = ShapedLogits(
                self.sampling, logits, committed, lengths, prompts, going, ends, tree
            )
            with self.session.verifying():
                verdict = self.verifier(tree, shaped, generator)
            verified = Moment(left.device)

            new, counts = _emitted(tree, verdict)
            counts = torch.where(left > 0, counts, 0)
            _append(committed, lengths, new, counts)
            nodes = counts - 1
            counts, ended = _cut(stop, ends, committed, lengths, new, counts)
            lengths = lengths + counts
            left = torch.where(ended, 0, left - counts)
            # all that the host has to know of a round, in one copy: each one waits for the device
            facts = [counts, left, shaped.faulty, torch.minimum(nodes, counts)]
            known = torch.cat([new, torch.stack(facts, dim=1)], dim=1).tolist()
            kept, missing, faulty, drafts = zip(*(row[-4:] for row in known), strict=True)
            working = [row for row, at_work in enumerate(waiting) if at_work]
            if any(faulty[row] for row in working):
                raise not_finite(type(self.session.model).__name__)
            emitted = [kept[row] for row in working]
            self.counter.count(emitted, [drafts[row] for row in working], tree.tokens.shape[1] > 0)
            drafting, verifying = began.until(proposed), proposed.until(verified)
            self.counter.draft_seconds += drafting
            self.counter.verify_seconds += verifying
            if account is not None:
                account.learn(asked, emitted, drafting + verifying)
            waiting = [more > 0 for more in missing]
            yield [row[:count] for row, count in zip(known, kept, strict=True)]

            counts = torch.where(left > 0, counts, 0)
            sizes = [size + n * more for size, n, more in zip(sizes, kept, waiting, strict=True)]
            longest, cached = max(compress(kept, waiting), default=1), max(sizes) - 1
            features = self.session.keep(verdict.path[:, : longest - 1], counts, cached)
            backlog.add(new[:, :longest], features, counts)

    def _check(self, lengths: list[int], stop: Stop) -> None:
        longest = max(lengths)
        if min(lengths) == 0:
            raise UserError(
                f"prompt {lengths.index(0) + 1} of {len(lengths)} is empty",
                "start it with at least one token, e.g. the tokenizer's bos_token",
            )
        limit = self.session.limit
        if limit is not None and longest + stop.max_new_tokens > limit:
            room = limit - longest
            raise UserError(
                f"a prompt of {longest} tokens with {stop.max_new_tokens} new tokens exceeds the "
                f"model's context of {limit}",
                f"generate at most {room} new tokens" if room > 0 else "shorten the prompt",
            )
        refuse_crossing(self.session.short, longest, stop.max_new_tokens)


def refuse_unsuited(verifier: Verifier, sampling: Shaping, tree: Any) -> None:
    """Check that a verifier supports the sampling and the tree.

    Args:
        verifier: The verifier.
        sampling: The shaping of the target's logits.
        tree: The drafter's tree, or None.

    Raises:
        UserError: The verifier is greedy and the temperature above 0, or it follows a single chain
            and the tree branches.
    """
    if getattr(verifier, "greedy", False) and not sampling.greedy:
        raise UserError(
            "a greedy verifier does not sample, but the temperature is above 0",
            "set the temperature to 0, or choose the verifier 'sampling'",
        )
    if getattr(verifier, "chain", False) and getattr(tree, "branches", False):
        raise UserError(
            f"{type(verifier).__name__} follows a single chain, but the tree "
            f"{type(tree).__name__} branches",
            "choose a tree that is a chain (`kdcore plugins list --kind tree`), or the verifier "
            "'sampling'",
        )


def _left_aligned(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts [B, T >= 2] padded on the right, and their lengths [B]."""
    real = attention_mask.bool()
    order = torch.argsort(~real, dim=1, stable=True)
    lengths = real.sum(1)
    prompt = input_ids.long().gather(1, order)[:, : int(lengths.max())]
    room = max(2 - prompt.shape[1], 0)
    return torch.cat([prompt, prompt.new_zeros(len(prompt), room)], dim=1), lengths


def _no_deeper(tree: DraftTree, depth: Tensor) -> DraftTree:
    """The tree without nodes deeper than ``depth`` [B], so that rows keep their limits."""
    return replace(tree, mask=tree.mask & (tree.shape.depth[:, 1:] <= depth[:, None]))


def _emitted(tree: DraftTree, verdict: Verdict) -> tuple[Tensor, Tensor]:
    """The tokens of a round, path and bonus [B, 1 + D] right-padded, and their counts [B]."""
    accepted = verdict.accepted
    path = tree.tokens.gather(1, verdict.path.clamp(min=0))
    new = torch.cat([path, path.new_zeros(len(path), 1)], dim=1)
    return new.scatter(1, accepted[:, None], verdict.token[:, None]), accepted + 1


def _append(committed: Tensor, lengths: Tensor, new: Tensor, counts: Tensor) -> None:
    """Write the new tokens of each row after its committed ones; others to the last column."""
    offsets = torch.arange(new.shape[1], device=new.device)
    beyond = committed.shape[1] - 1
    places = torch.where(offsets < counts[:, None], lengths[:, None] + offsets, beyond)
    committed.scatter_(1, places, new)


def _cut(
    stop: Stop, last: Tensor, committed: Tensor, lengths: Tensor, new: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """The counts [B] up to the end of each row, and whether it ends [B] bool.

    Args:
        stop: When a row ends.
        last: [E] int64, ``stop.end`` on the device.
        committed: See `Decoder`.
        lengths: See `Decoder`.
        new: The tokens just appended.
        counts: Their numbers.
    """
    offsets = torch.arange(new.shape[1], device=new.device)
    ends = torch.isin(new, last)
    ends &= offsets < counts[:, None]
    if stop.criteria:
        for row, count in enumerate(counts.tolist()):
            for offset in range(count):
                so_far = committed[row : row + 1, : int(lengths[row]) + offset + 1]
                ends[row, offset] |= stop.criteria(so_far, None).item()
    ended = ends.any(1)
    return torch.where(ended, ends.int().argmax(1) + 1, counts), ended
