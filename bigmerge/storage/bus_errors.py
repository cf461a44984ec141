"""A mapped file that is truncated while it is being read: a flag to look at, where the kernel's answer is SIGBUS.

The signal is raised in the thread that touches the page, in the midst of native code. The handler gives the
rest of the mapping pages of zeros, so that the instruction can go on, and marks the mapping as broken; whoever
uses what was read asks for the mark first. It is called only by real faults in watched mappings: everything
else is left to the handler that was there before.
"""

from __future__ import annotations

import ctypes
import mmap
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

_FLAGS = 4 | 0x40000000  # SA_SIGINFO | SA_NODEFER: a signal that is passed on arrives at once
_NONEXISTENT = 2  # BUS_ADRERR: the mapping has no page there. Not a hardware error, not sent by a process.
_FIXED_ANONYMOUS = 0x10 | 0x20 | 0x02  # MAP_FIXED | MAP_ANONYMOUS | MAP_PRIVATE
_PAGE = mmap.PAGESIZE


class _SignalSet(ctypes.Structure):
    _fields_ = (("bits", ctypes.c_ulong * 16),)


class _Action(ctypes.Structure):
    """The C library's struct sigaction on Linux."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", _SignalSet),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


class _Information(ctypes.Structure):
    """The head of struct siginfo_t on 64-bit Linux."""

    _fields_ = (
        ("number", ctypes.c_int),
        ("errno", ctypes.c_int),
        ("code", ctypes.c_int),
        ("padding", ctypes.c_int),
        ("address", ctypes.c_void_p),
    )


class Watch:
    """A watched mapping.

    Attributes:
        broken: whether a part of it was touched that its file no longer has. It stays so.
    """

    def __init__(self, address: int, nbytes: int) -> None:
        self.address = address
        self.end = address + -(-nbytes // _PAGE) * _PAGE
        self.broken = False

    def close(self) -> None:
        """Watch it no longer. To be called before it is unmapped."""
        _forget(self)


def watch_mapping(address: int, nbytes: int) -> Watch:
    """Watch `nbytes` bytes of a mapped file from `address`, a page's start.

    Where the platform has no such signals the watch never finds anything.
    """
    watch = Watch(address, nbytes)
    if nbytes and sys.platform == "linux" and ctypes.sizeof(ctypes.c_void_p) == 8:
        with _lock:
            _watches.append(watch)
            if len(_watches) == 1:
                _install()
    return watch


_lock = threading.Lock()
_watches: list[Watch] = []
_before = _Action()
_libc = ctypes.CDLL(None, use_errno=True)
_libc.sigaction.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.mmap.restype = ctypes.c_void_p


def _forget(watch: Watch) -> None:
    with _lock:
        if watch in _watches:
            _watches.remove(watch)
            if not _watches:
                _restore()


def _install() -> None:
    action = _Action(handler=ctypes.cast(_handler, ctypes.c_void_p), flags=_FLAGS)
    _libc.sigaction(signal.SIGBUS, ctypes.byref(action), ctypes.byref(_before))


def _restore() -> None:
    now = _Action()
    _libc.sigaction(signal.SIGBUS, None, ctypes.byref(now))
    if now.handler == ctypes.cast(_handler, ctypes.c_void_p).value:  # else someone has put in another since
        _libc.sigaction(signal.SIGBUS, ctypes.byref(_before), None)


def _on_fault(number: int, information: int, context: int) -> None:
    del number, context
    # No lock here: the thread may hold it. Lists are changed whole or not at all.
    told = _Information.from_address(information)
    try:
        for watch in list(_watches):
            if told.code == _NONEXISTENT and watch.address <= (told.address or 0) < watch.end:
                watch.broken = True
                first = told.address // _PAGE * _PAGE
                mapped = _libc.mmap(first, watch.end - first, mmap.PROT_READ, _FIXED_ANONYMOUS, -1, 0)
                if mapped == first:
                    return
    except Exception:
        pass
    # Not ours. The fault comes again and meets the old handler; what a process has sent is passed on to it.
    _restore()
    if told.code != _NONEXISTENT:
        signal.raise_signal(signal.SIGBUS)
        if _watches:  # it has survived
            _install()


_Handler: Callable[..., Any] = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_handler = _Handler(_on_fault)
