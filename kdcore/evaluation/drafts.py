"""The acceptance of a drafter's proposals on held-out rows, computed without decoding.

Greedy decoding is simulated: from a row's first anchor on, the levels that are right in sequence
are accepted, the target adds one token, and the next anchor follows it. On rows that the target
itself answered greedily, the result equals that of decoding, token for token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from kdcore.data.batching.anchors import at_anchors
from kdcore.data.rows import RowDataset, batch_of, collate
from kdcore.method.logits import HiddenLogits
from kdcore.method.records import Batch
from kdcore.runs.progress import Progress
from kdcore.runs.results import Measured, Metric
from kdcore.training.views import DrafterView


def metrics(depth: int, candidates: int) -> tuple[Metric, ...]:
    """Return the metrics of a drafter of depth D, for a backbone tree of ``candidates``."""
    return (
        Metric("tau", "tau of a chain", ".2f", "higher"),
        Metric("tau_tree", f"tau of a backbone of {candidates}", ".2f", "higher"),
        *(
            Metric(f"level_{i}", f"accuracy, level {i}", ".1%", "higher")
            for i in range(1, depth + 1)
        ),
    )


@dataclass(frozen=True, slots=True)
class HeldOutDrafts:
    """Held-out rows for measuring drafters.

    Attributes:
        rows: The rows.
        pad: Input -> padding value, see `kdcore.data.rows.collate`.
        batch_size: Rows per batch.
        candidates: Candidates per level of the backbone tree.
        chunk: Number of positions whose logits exist at a time.
        progress: The display of the measurement.
    """

    rows: RowDataset
    pad: Mapping[str, int]
    batch_size: int
    candidates: int
    chunk: int
    progress: Progress

    def measure(self, view: DrafterView) -> Measured:
        """Measure the view's drafter on the rows by `measure_drafts`, on the target's device."""
        drafter: Any = view.drafter
        vocabulary = None if drafter.vocabulary is None else drafter.vocabulary.cpu()
        loader: DataLoader[Any] = DataLoader(
            self.rows,
            self.batch_size,
            collate_fn=lambda rows: at_anchors(collate(rows, self.pad), drafter.depth, vocabulary),
        )
        drafter.eval()
        device = view.target.device
        with self.progress.stage("measure held-out rows", len(loader)) as stage:

            def batches() -> Iterable[Batch]:
                for padded in loader:
                    yield batch_of(padded, device)
                    stage.advance()

            return measure_drafts(
                lambda batch: view(drafter, batch)[0], batches(), self.candidates, self.chunk
            )


@torch.no_grad()
def measure_drafts(
    drafted: Callable[[Batch], HiddenLogits],
    batches: Iterable[Batch],
    candidates: int,
    chunk: int,
) -> Measured:
    """Measure a drafter at every anchor; each figure is a ratio per row.

    The figures are ``tau``, learned tokens per verification of a chain, including the bonus;
    ``tau_tree``, the same for a backbone tree of ``candidates``; and ``level_I``, the accuracy of
    level I's likeliest token over all anchors.

    Args:
        drafted: Returns the drafter's logits at a batch's masked anchors.
        batches: The batches; a label of -1 is outside the drafter's vocabulary, so that every
            proposal for it is wrong.
        candidates: Candidates per level of the backbone tree.
        chunk: Number of positions whose logits exist at a time.

    Returns:
        The figures by row.
    """
    emitted: list[int] = []
    rounds: dict[str, list[int]] = {"tau": [], "tau_tree": []}
    levels: dict[str, tuple[list[int], list[int]]] = {}
    for batch in batches:
        best = _ranks(drafted(batch), batch.labels[batch.mask], candidates, chunk)
        rank = torch.full_like(batch.labels, candidates)  # [B * T, D]; this rank: not proposed
        rank[batch.mask] = best
        right, depth = rank == 0, batch.mask.shape[1]
        sequences = len(batch.index)
        hits, anchors = (
            each.view(sequences, -1, depth).sum(1).T.tolist()
            for each in (right & batch.mask, batch.mask)
        )
        for level, counts in enumerate(zip(hits, anchors, strict=True), start=1):
            for all_rows, these in zip(
                levels.setdefault(f"level_{level}", ([], [])), counts, strict=True
            ):
                all_rows.extend(these)

        chain = right.cumprod(1).sum(1)
        below = rank.gather(1, chain.clamp(max=depth - 1)[:, None])[:, 0] < candidates
        tree = chain + ((chain < depth) & below)
        learned = batch.mask[:, 0].view(sequences, -1)
        for name, accepted in (("tau", chain), ("tau_tree", tree)):
            rounds[name].extend(
                _rounds(row.nonzero()[:, 0].tolist(), lengths.tolist())
                for row, lengths in zip(learned, accepted.view(sequences, -1), strict=True)
            )
        emitted.extend(learned.sum(1).tolist())
    taus = {name: (emitted, taken) for name, taken in rounds.items()}
    return Measured(emitted, ratios={**taus, **levels})


def feature_rms(features: Tensor, layers: int) -> list[float]:
    """Return the root mean square of each layer's part of features [..., F]."""
    parts = features.float().chunk(layers, -1) if layers else ()
    return [float(part.square().mean().sqrt()) for part in parts]


def _ranks(logits: HiddenLogits, labels: Tensor, candidates: int, chunk: int) -> Tensor:
    """The rank [N] of each label among the drafter's likeliest tokens, at most ``candidates``."""
    ranks = []
    for start in range(0, len(labels), chunk):
        part = slice(start, start + chunk)
        scores = logits.logits(part)
        proposed = scores.topk(min(candidates, scores.shape[1]), dim=1).indices
        hit = proposed == labels[part, None]
        ranks.append(torch.where(hit.any(1), hit.int().argmax(1), candidates))
    return torch.cat(ranks) if ranks else labels


def _rounds(anchors: list[int], accepted: list[int]) -> int:
    """The number of verifications that emit a row's learned tokens.

    ``anchors`` are the rising places whose next token but one is learned; a gap separates
    responses.
    """
    rounds, following = 0, -1
    for anchor in anchors:
        if anchor >= following:
            rounds += 1
            following = anchor + accepted[anchor] + 1
    return rounds
