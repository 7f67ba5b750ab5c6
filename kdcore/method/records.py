"""The frozen records that flow between the parts, and the one legend of shape letters.

Shape letters, used as suffixes of tensor names and in every docstring:

| letter | what it counts |
| --- | --- |
| B | rows: a sequence, a classifier's example (T = 1), or a drafter's anchor (T = D) |
| T | positions in a row |
| V | classes (the vocabulary, or the labels of a classifier) |
| K | classes of one part of the knowledge |
| D | draft depth: how many tokens a drafter looks ahead |
| N | nodes of a draft tree, or masked positions of a batch laid flat |
| H | width of a hidden state |

Nothing downstream of a view can tell which kind of row it holds, and rows and positions are
independent until the loss engine reduces them: therefore a record may hold a whole batch, or a
chunk of its masked positions with B = 1 and T = the chunk's length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

LOG_ZERO = -1e4
"""The finite stand-in for log 0: its exp is exactly 0 in float32, and it never makes a NaN."""


@dataclass(frozen=True, slots=True)
class Row:
    """One example as its source encoded it, not yet padded.

    inputs: what the model's forward takes, each without the batch dimension.
    labels: [T] int64, already shifted: ``labels[t]`` is what position t must predict.
    mask: [T] bool, the positions that are learned (a response with its end token).
    id: how messages name this example.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor
    mask: Tensor
    id: str


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows padded to one length.

    inputs: the model's keyword arguments, each [B, ...].
    labels: [B, T] int64; mask: [B, T] bool; index: [B] int64, the rows' places in the data set.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor
    mask: Tensor
    index: Tensor


@dataclass(frozen=True, slots=True)
class LogitBatch:
    """All that a gate, a splitter or a divergence ever sees.

    student: [B, T, V] float logits at temperature 1, with gradient where a loss is made.
    teacher: [B, T, V] float logits at temperature 1, detached.
    labels: [B, T] int64; mask: [B, T] bool; progress: share of the training done, in [0, 1].
    generator: the only source of randomness, on the logits' device, one for each gate; seeded
        anew for each batch from the run's seed and the step, so that a resumed run draws what the
        unbroken one drew.
    position: [B, T] int64, each position's place in its row, from 0: of a drafter's anchor, how
        many tokens lie between it and the predicted one.
    student_hidden, teacher_hidden: [B, T, H] the states that the heads read, the teacher's
        detached; None from a teacher that is only logits, and while a gate is asked.
    reference: [B, T, V] float logits at temperature 1 of a third model, detached; None unless a
        gate asks for one (see `kdcore.method.protocols.Gate`), and while a loss is made.
    """

    student: Tensor
    teacher: Tensor
    labels: Tensor
    mask: Tensor
    progress: float
    generator: torch.Generator
    position: Tensor
    student_hidden: Tensor | None = None
    teacher_hidden: Tensor | None = None
    reference: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """One component of the knowledge: a K-way pair of logits at each position.

    student, teacher: [B, T, K] float logits, already divided by the loss temperature tau;
        an excluded class was put at `LOG_ZERO` in both, so its probability is exactly 0.
    weight: [B, T] float factor of this part's divergence at each position, detached.
    """

    student: Tensor
    teacher: Tensor
    weight: Tensor


@dataclass(frozen=True, slots=True)
class TreeShape:
    """Who follows whom in a draft tree: constant for a static tree, so it is made apart.

    A slot is a place in the pass that scores the tree: slot 0 is the root (the last committed
    token, which the target has chosen but not yet run), slot 1 + n is node n. The leading
    dimension is B, or 1 when all rows share the shape. `kdcore.decoding.tree` makes them.

    parents: [B or 1, N] int64, the index of the parent node, or -1 for a child of the root;
        parents come before children.
    depth: [B or 1, 1 + N] int64, edges from the root to each slot.
    sees: [B or 1, 1 + N, 1 + N] bool, whether slot i is slot j or descends from it.
    """

    parents: Tensor
    depth: Tensor
    sees: Tensor


@dataclass(frozen=True, slots=True)
class DraftTree:
    """Proposed continuations of B committed rows.

    tokens: [B, N] int64; siblings carry distinct tokens.
    shape: who follows whom.
    mask: [B, N] bool, False on padding nodes of rows that propose fewer.
    logp: [B, N, V] float, the log-probs each token was *sampled* from; None when the candidates
        are a fixed list (top-k), which every lossless verifier must treat as such.
    """

    tokens: Tensor
    shape: TreeShape
    mask: Tensor
    logp: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the target keeps of a draft tree.

    path: [B, D] int64 node indices from the root down, -1 after the last accepted one.
    token: [B] int64, the target's own next token after the path (the bonus).
    """

    path: Tensor
    token: Tensor

    @property
    def accepted(self) -> Tensor:
        """[B] int64, the number of accepted nodes."""
        return (self.path >= 0).sum(1)
