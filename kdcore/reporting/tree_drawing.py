"""The drawing of a replay's round: the positions of the tree's nodes and the lines between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kdcore.runs.results import Node, Round

ACROSS, DOWN = 116, 30
"""Pixels from one depth to the next, and from one branch to the next."""
SHOWN, WIDE = 12, 7.3
"""Maximum number of characters of a token, and pixels per character."""


@dataclass(frozen=True)
class Place:
    """A node in the drawing.

    Attributes:
        x: Horizontal position in pixels.
        y: Vertical position in pixels.
        text: The token, truncated.
        whole: The token.
        accepted: Whether the target accepted the token.
        line: The line from the parent, as SVG's path.
    """

    x: float
    y: float
    text: str
    whole: str
    accepted: bool
    line: str


@dataclass(frozen=True)
class Drawing:
    """A drawn tree.

    Attributes:
        width: Width in pixels.
        height: Height in pixels.
        root: Vertical position of the root in pixels.
        places: The nodes.
    """

    width: float
    height: float
    root: float
    places: list[Place]


def drawing(drawn: Round) -> Drawing:
    """Lay out a round's tree: depth grows to the right, a parent is level with its first child."""
    nodes = drawn.nodes
    depths, rows = _depths(nodes), _rows(nodes)
    root = rows[next((n for n, node in enumerate(nodes) if node.parent < 0), 0)] if nodes else 0.0
    places = []
    for node, depth, row in zip(nodes, depths, rows, strict=True):
        above = root if node.parent < 0 else rows[node.parent]
        x = ACROSS * depth
        start = x - ACROSS + (12 if node.parent < 0 else 4 + WIDE * len(_cut(nodes[node.parent])))
        line = f"M {start} {DOWN * (above + 1)} C {x - 10} {DOWN * (above + 1)}, "
        line += f"{start} {DOWN * (row + 1)}, {x - 6} {DOWN * (row + 1)}"
        y, whole = DOWN * (row + 1), _visible(node.text)
        places.append(Place(x, y, _visible(_cut(node)), whole, node.accepted, line))
    deepest = max(depths, default=0)
    return Drawing(
        ACROSS * (deepest + 1), DOWN * (max(rows, default=0) + 2), DOWN * (root + 1), places
    )


def _depths(nodes: Sequence[Node]) -> list[int]:
    depths: list[int] = []
    for node in nodes:
        depths.append(1 if node.parent < 0 else depths[node.parent] + 1)
    return depths


def _rows(nodes: Sequence[Node]) -> list[float]:
    """The row of each node: children in their order, accepted or not."""
    children: dict[int, list[int]] = {}
    for n, node in enumerate(nodes):
        children.setdefault(node.parent, []).append(n)
    rows = [0.0] * len(nodes)
    free = 0
    waiting = list(reversed(children.get(-1, [])))
    while waiting:  # depth first, without recursion: a chain may be long
        n = waiting.pop()
        rows[n] = free
        below = children.get(n, [])
        waiting += reversed(below)
        free += not below
    return rows


def _cut(node: Node) -> str:
    return node.text if len(node.text) <= SHOWN else node.text[: SHOWN - 1] + "…"


def _visible(text: str) -> str:
    """A text with signs for its invisible characters."""
    return text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "·") or "∅"
