"""Ctrl-C, SIGTERM and a closed terminal: one way to stop, whenever the signal comes.

A `KeyboardInterrupt` out of a signal handler can be lost: a library turns it into an error of its
own, or it arrives inside a destructor, which swallows it. So the handler also remembers the signal,
and a swallowed one is sent again.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_HANG_UP: int | None = getattr(signal, "SIGHUP", None)  # Windows has none
_SIGNALS = (signal.SIGINT, signal.SIGTERM, *([_HANG_UP] if _HANG_UP else []))
_AGAIN = 0.1
"""Seconds until a swallowed signal is sent again, which may be too soon once more."""
_received: list[int] = []
"""The signals of a process that `stop_on_signals`."""


class Terminated(KeyboardInterrupt):
    """An interruption by SIGTERM or SIGHUP, which ends a conversation too."""


def stop_on_signals() -> None:
    """Let the signals interrupt this process from now on, and remember them.

    A process that is started to outlive its terminal (``nohup``) still does.
    """
    for number in _SIGNALS:
        if number != _HANG_UP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)
    sys.unraisablehook = _send_swallowed_again


def ignore_signals() -> None:
    """Let none of them disturb the end of this process."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def was_interrupted() -> bool:
    """Whether a signal has come that nothing has answered yet."""
    return bool(_received)


def answered() -> None:
    """Forget the signals so far: what they interrupted goes on with something else."""
    _received.clear()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore the signals in the block, which is short."""
    if not _in_main_thread():
        yield
        return
    kept: dict[int, Any] = {n: signal.signal(n, signal.SIG_IGN) for n in _SIGNALS}
    try:
        yield
    finally:
        _restore(kept)


@contextmanager
def deferred(note: Callable[[str], None], what: str) -> Iterator[Callable[[], bool]]:
    """Let the block stop by itself on the first signal; the second one interrupts it at once.

    A signal that this process ignores stays ignored.

    Args:
        note: Receiver of one line at the first signal.
        what: What the block still does then.

    Yields:
        A function that tells whether a signal has come.
    """
    asked: list[int] = []
    if not _in_main_thread():
        yield lambda: False
        return

    def stop(number: int, frame: Any) -> None:
        if asked:
            kept[number](number, frame)
        asked.append(number)
        try:
            note(f"stopping: {what}; another Ctrl-C stops at once")
        except (RuntimeError, OSError):  # the signal came inside a print, or the terminal is closed
            return

    handled = [number for number in _SIGNALS if callable(signal.getsignal(number))]
    kept: dict[int, Any] = {number: signal.signal(number, stop) for number in handled}
    try:
        yield lambda: bool(asked)
    finally:
        _restore(kept)


def _stop(number: int, frame: Any) -> None:
    _received.append(number)
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def _send_swallowed_again(swallowed: Any) -> None:
    """Handle an exception that Python cannot raise, e.g. out of a destructor."""
    if not (_received and issubclass(swallowed.exc_type, KeyboardInterrupt)):
        sys.__unraisablehook__(swallowed)
        return
    again = threading.Timer(_AGAIN, os.kill, (os.getpid(), _received[-1]))
    again.daemon = True
    again.start()


def _restore(kept: dict[int, Any]) -> None:
    for number, handler in kept.items():
        if handler is not None:  # not one of Python's
            signal.signal(number, handler)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
