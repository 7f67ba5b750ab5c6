"""How far a drafter's proposals would be accepted on held-out rows, without decoding them.

Greedy decoding is replayed: from a row's first anchor on, as many levels are accepted as are right
one after the other, the target adds one token, and the next anchor stands behind it. On rows that
the target itself answered greedily this is what decoding them would do, token for token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from kdcore.data.anchors import at_anchors
from kdcore.data.rows import RowDataset, batch_of, collate
from kdcore.method.logits import HiddenLogits
from kdcore.method.records import Batch
from kdcore.runs.progress import Progress
from kdcore.runs.results import Measured, Metric
from kdcore.training.views import DrafterView


def metrics(depth: int, candidates: int) -> tuple[Metric, ...]:
    """How the figures of a drafter of depth D are shown."""
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
    """Rows to measure a drafter on. See `kdcore.evaluation.heldout.HeldOut`."""

    rows: RowDataset
    pad: Mapping[str, int]
    batch_size: int
    candidates: int
    chunk: int
    progress: Progress

    def measure(self, view: DrafterView) -> Measured:
        """`measure_drafts` over the rows, on the target's device."""
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
                    yield batch_of({name: each.to(device) for name, each in padded.items()})
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
    """Every anchor of every row, as ratios of its row.

    tau: learned tokens per verification of a chain, the bonus counted. tau_tree: of a backbone tree
    of ``candidates``. level_I: how often the likeliest token of level I was the one that followed,
    of all anchors.

    drafted: gives the drafter's logits at a batch's masked anchors. batches: their labels are -1
    where the token is outside the drafter's vocabulary: a proposal is then wrong. chunk: anchors'
    positions whose logits exist at once.
    """
    emitted: list[int] = []
    rounds: dict[str, list[int]] = {"tau": [], "tau_tree": []}
    levels: dict[str, tuple[list[int], list[int]]] = {}
    for batch in batches:
        best = _ranks(drafted(batch), batch.labels[batch.mask], candidates, chunk)
        rank = torch.full_like(batch.labels, candidates)  # [B * T, D], as good as not proposed
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
    """The root mean square of each layer's part of features [..., F]."""
    parts = features.float().chunk(layers, -1) if layers else ()
    return [float(part.square().mean().sqrt()) for part in parts]


def _ranks(logits: HiddenLogits, labels: Tensor, candidates: int, chunk: int) -> Tensor:
    """[N] how many tokens the drafter finds likelier than the label, at most ``candidates``."""
    ranks = []
    for start in range(0, len(labels), chunk):
        part = slice(start, start + chunk)
        scores = logits.logits(part)
        proposed = scores.topk(min(candidates, scores.shape[1]), dim=1).indices
        hit = proposed == labels[part, None]
        ranks.append(torch.where(hit.any(1), hit.int().argmax(1), candidates))
    return torch.cat(ranks) if ranks else labels


def _rounds(anchors: list[int], accepted: list[int]) -> int:
    """Verifications until the row's learned tokens are out.

    anchors: places whose next token but one is learned, rising; a gap is another response.
    """
    rounds, following = 0, -1
    for anchor in anchors:
        if anchor >= following:
            rounds += 1
            following = anchor + accepted[anchor] + 1
    return rounds
