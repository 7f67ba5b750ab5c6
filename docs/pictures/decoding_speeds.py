"""Draws decoding_speeds.svg from the table "In bfloat16" of docs/results.md.

python docs/pictures/decoding_speeds.py
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
CAPTION = (
    "SmolLM2-135M-Instruct in bfloat16, 15 prompts of five sets, one at a time, on two threads of",
    "a CPU without bfloat16 products. Lines: 95 % bootstrap intervals. Numbers: docs/results.md.",
)
LEFT, SCALE, ROW, TOP = 290, 190, 24, 64  # pixels; SCALE is that of a ratio of 1
COLOURS = {"fasteagle": "#2a6fbb", "eagle3": "#d07a1f", "our plain loop": "#8a8f98"}

_ROW = re.compile(r"^\| ([^|]+), ([01]) \| ([\d.]+) \[([\d.]+), ([\d.]+)\] \|", re.MULTILINE)


class Speed(NamedTuple):
    """One row of the table: the speed as a multiple of that of transformers' `generate`."""

    method: str
    temperature: str
    mean: float
    low: float
    high: float


def speeds(page: str) -> list[Speed]:
    """Read the table.

    Args:
        page: the text of docs/results.md.

    Returns:
        The rows in the table's order.
    """
    table = page.split("### In bfloat16\n")[1].split("\n### ")[0]
    return [
        Speed(method.replace("`", ""), temperature, *map(float, numbers))
        for method, temperature, *numbers in _ROW.findall(table)
    ]


def drawn(rows: list[Speed]) -> str:
    """Draw the rows as an SVG with one group of bars for each temperature."""
    parts: list[str] = []
    y = TOP
    for temperature in ("0", "1"):
        parts.append(_text(12, y + 16, f"temperature {temperature}", "font-weight='600'"))
        y += ROW
        for row in rows:
            if row.temperature == temperature:
                parts += _bar(row, y)
                y += ROW
        y += 10
    base = LEFT + SCALE
    line = f"<line x1='{base}' x2='{base}' y1='{TOP - 6}' y2='{y - 8}'"
    parts.append(f"{line} stroke='#222' stroke-dasharray='4 3'/>")
    parts.append(_text(base, TOP - 12, "generate() of transformers = 1", "text-anchor='middle'"))
    title = "Decoding speed, as a multiple of that of generate() in transformers"
    parts.append(_text(12, 24, title, "font-size='16' font-weight='600'"))
    for number, line in enumerate(CAPTION):
        parts.append(_text(12, y + 14 + 17 * number, line, "font-size='12' fill='#555'"))
    height = y + 14 + 17 * len(CAPTION)
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 760 {height}' width='760' "
        f"height='{height}' font-family='sans-serif' font-size='13' fill='#222'>\n"
        "<rect width='100%' height='100%' fill='#fff'/>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _bar(row: Speed, y: int) -> list[str]:
    colour = next(colour for name, colour in COLOURS.items() if row.method.startswith(name))
    low, high, middle = LEFT + SCALE * row.low, LEFT + SCALE * row.high, y + ROW / 2 - 1
    return [
        _text(LEFT - 8, y + 16, row.method.partition(" of ")[0], "text-anchor='end'"),
        f"<rect x='{LEFT}' y='{y + 3}' width='{SCALE * row.mean:.1f}' height='{ROW - 8}' "
        f"fill='{colour}' fill-opacity='0.8'/>",
        f"<path d='M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 4}v8"
        f"M{high:.1f} {middle - 4}v8' stroke='#111' stroke-width='1.5'/>",
        _text(round(high) + 8, y + 16, f"{row.mean:.2f}", ""),
    ]


def _text(x: float, y: float, text: str, style: str) -> str:
    return f"<text x='{x}' y='{y}' {style}>{escape(text)}</text>"


if __name__ == "__main__":
    picture = drawn(speeds((HERE.parent / "results.md").read_text()))
    (HERE / "decoding_speeds.svg").write_text(picture)
