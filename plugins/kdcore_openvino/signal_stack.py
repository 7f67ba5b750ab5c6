"""The alternate stack for signals of a thread, which OpenVINO replaces by one of its own.

Its CPU plugin sets a stack when it is loaded, and brings the one before back when it is unloaded.
Where several end in another order than the reverse of their beginnings, or in another thread, what
is left is unmapped memory, and the next signal that Python handles, such as Ctrl-C, is a
segmentation fault.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class SignalStack(ctypes.Structure):
    """``stack_t`` of Linux: the stack's address, its flags, and its size in bytes."""

    _fields_ = [("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

    @classmethod
    def current(cls) -> SignalStack:
        """The stack of this thread."""
        found = cls()
        ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found))
        return found


@contextmanager
def signal_stack_kept() -> Iterator[None]:
    """Give this thread the stack again that it had before the block, which loads OpenVINO's plugin.

    The plugin then leaves the stack alone when it is unloaded.
    """
    if sys.platform != "linux":  # where OpenVINO does nothing of the kind
        yield
        return
    before = SignalStack.current()
    try:
        yield
    finally:
        ctypes.CDLL(None).sigaltstack(ctypes.byref(before), None)
