"""Progress display: bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Column

from kdcore.errors import one_line
from kdcore.runs.progress import Progress, Silent, Stage
from kdcore_cli.terminal.console import with_options

SECONDS_BETWEEN_LINES = 10.0


def progress_on(console: Console, quiet: bool) -> Progress:
    """Choose the progress display of a console.

    Args:
        console: Console to print to.
        quiet: Whether to print nothing.

    Returns:
        Bars for a terminal, lines for a file or pipe, or a silent display.
    """
    if quiet:
        return Silent()
    return Bars(console) if console.is_terminal else Lines(console)


class Bars:
    """Live progress bars; the bar of an inner stage disappears when the stage ends."""

    def __init__(self, console: Console) -> None:
        self._bars = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn(
                "{task.fields[figures]}",
                style="dim",
                markup=False,
                table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
            ),
            console=console,
            expand=True,  # the figures take the width that the other columns leave
        )
        self._depth = 0

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[Stage]:
        """See `Progress.stage`."""
        if self._depth == 0:
            self._bars.start()
        self._depth += 1
        task = self._bars.add_task(
            one_line(name), total=total, completed=done, figures="", visible=total > 0
        )
        try:
            yield _Bar(self._bars, task)
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._bars.stop()  # leaves the finished bar on the screen
            self._bars.remove_task(task)

    def note(self, line: str) -> None:
        """See `Progress.note`."""
        self._bars.console.print(one_line(with_options(line)))


class _Bar:
    def __init__(self, bars: RichProgress, task: TaskID) -> None:
        self._bars, self._task = bars, task

    def advance(self, steps: int = 1, **figures: float) -> None:
        """See `Stage.advance`."""
        if figures:
            self._bars.update(self._task, figures=_figures(figures))
        self._bars.advance(self._task, steps)


class Lines:
    """Plain progress lines with the remaining time, at most one every ten seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[Stage]:
        """See `Progress.stage`."""
        counter = _Counter(self, name, total, done)
        yield counter
        counter.finish()

    def note(self, line: str) -> None:
        """See `Progress.note`."""
        self._console.print(one_line(with_options(line)), soft_wrap=True)


class _Counter:
    def __init__(self, lines: Lines, name: str, total: int, done: int) -> None:
        self._lines, self._name, self._total = lines, name, total
        self._first = self._done = done
        self._figures: Mapping[str, float] = {}
        self._began = self._shown = time.monotonic()

    def advance(self, steps: int = 1, **figures: float) -> None:
        """See `Stage.advance`."""
        self._done += steps
        self._figures = figures or self._figures
        now = time.monotonic()
        if now - self._shown >= SECONDS_BETWEEN_LINES and self._done < self._total:
            self._shown = now
            each = (now - self._began) / (self._done - self._first)
            self._show(f"{duration(each * (self._total - self._done))} left")

    def finish(self) -> None:
        if self._total:  # a stage without work is not worth a line
            self._show(f"took {duration(time.monotonic() - self._began)}")

    def _show(self, when: str) -> None:
        parts = [f"{self._name} {self._done}/{self._total}", when, _figures(self._figures)]
        self._lines.note("  ".join(filter(None, parts)))


def duration(seconds: float) -> str:
    """Format a duration.

    Args:
        seconds: Duration in seconds.

    Returns:
        Hours, minutes and seconds, e.g. ``1:02:03`` or ``4:05``.
    """
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def _figures(figures: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
