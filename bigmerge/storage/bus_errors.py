"""A mapped file that is truncated while it is being read: a flag to look at, where the kernel's answer is SIGBUS.

The signal is raised in the thread that touches the page, in the midst of native code. The handler gives the
rest of the mapping pages of zeros, so that the instruction can go on, and marks the mapping as broken; whoever
uses what was read asks for the mark first. It is called only by real faults in watched mappings: everything
else is left to the handler that was there before.

The handler is written in Python, so it waits for the interpreter lock: no thread may hold the lock while it
waits for native threads that read a mapping. A signal handler in Python (Ctrl-C) that raises at just this time,
on the main thread, is reported as an ignored exception and its exception is lost; the mark is set all the same.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

_FLAGS = 4 | 0x40000000  # SA_SIGINFO | SA_NODEFER: a signal that is passed on arrives at once
_NONEXISTENT = 2  # BUS_ADRERR: the mapping has no page there. Not a hardware error, not sent by a process.
_NOT_TOUCHED = 5  # BUS_MCEERR_AO: memory found bad before it is used, so no instruction to repeat.
#: Where the structs below are laid out as the C library has them; elsewhere nothing is watched.
_SUPPORTED = (
    sys.platform == "linux"
    and ctypes.sizeof(ctypes.c_void_p) == 8
    and platform.machine() in ("x86_64", "aarch64")
)
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


class _Region:
    """Whole pages of watched addresses. Compared by identity; one may be watched twice."""

    __slots__ = ("address", "broken", "end")

    def __init__(self, address: int, nbytes: int) -> None:
        self.address = address
        self.end = address + -(-nbytes // _PAGE) * _PAGE
        self.broken = False


class Watch:
    """A watched mapping. One that is dropped, or still open when the interpreter ends, is closed."""

    def __init__(self, region: _Region) -> None:
        self._region = region
        self._close = weakref.finalize(self, _forget, region)

    @property
    def broken(self) -> bool:
        """Whether a part of it was touched that its file no longer has. It stays so."""
        return self._region.broken

    def close(self) -> None:
        """Watch it no longer. To be called before it is unmapped; more than once is the same as once."""
        self._close()


def watch_mapping(address: int, nbytes: int) -> Watch:
    """Watch `nbytes` bytes of a mapped file from `address`, a page's start.

    Where the platform has no such signals the watch never finds anything.
    """
    region = _Region(address, nbytes)
    watch = Watch(region)
    if nbytes and _SUPPORTED:
        with _lock:
            _watched.append(region)
            if len(_watched) == 1:
                _install()
    return watch


_lock = threading.RLock()  # a collection inside may close another watch
_watched: list[_Region] = []
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


def _forget(region: _Region) -> None:
    with _lock:
        if region in _watched:
            _watched.remove(region)
            if not _watched:
                _restore()


def _install() -> None:
    now = _current()
    if not _is_ours(now):  # else there is nothing earlier to learn; it would be left to itself
        ctypes.memmove(ctypes.byref(_before), ctypes.byref(now), ctypes.sizeof(_Action))
    action = _Action(handler=ctypes.cast(_handler, ctypes.c_void_p), flags=_FLAGS)
    _libc.sigaction(signal.SIGBUS, ctypes.byref(action), None)


def _restore() -> None:
    if _is_ours(_current()):  # else someone has put in another since
        _libc.sigaction(signal.SIGBUS, ctypes.byref(_before), None)


def _current() -> _Action:
    action = _Action()
    _libc.sigaction(signal.SIGBUS, None, ctypes.byref(action))
    return action


def _is_ours(action: _Action) -> bool:
    return bool(action.handler == ctypes.cast(_handler, ctypes.c_void_p).value)


def _on_fault(number: int, information: int, context: int) -> None:
    del number, context
    sent = False
    for _ in range(3):
        try:
            told = _Information.from_address(information)
            sent = told.code <= 0 or told.code == _NOT_TOUCHED
            if told.code == _NONEXISTENT and _give_zeros(told.address or 0):
                return
            break
        except BaseException:  # from a signal handler in Python, which may run between any two lines here
            continue
    # Not ours. A fault comes again and meets the old handler; what comes once only is passed on to it. Whatever
    # handler is there now: one that came later and calls this one would call it for ever.
    _libc.sigaction(signal.SIGBUS, ctypes.byref(_before), None)
    if sent:
        try:
            signal.raise_signal(signal.SIGBUS)
        finally:
            if _watched:  # it has survived
                _install()


def _give_zeros(address: int) -> bool:
    """Make what is watched readable, from the page of `address` on; False where it is not watched."""
    # No lock here: the thread may hold it. Lists are changed whole or not at all.
    regions = list(_watched)
    end = max((region.end for region in regions if region.address <= address < region.end), default=0)
    if not end:
        return False
    first = address // _PAGE * _PAGE
    for region in regions:
        if region.address < end and first < region.end:
            region.broken = True  # before anyone can read the zeros
    return bool(_libc.mmap(first, end - first, mmap.PROT_READ, _FIXED_ANONYMOUS, -1, 0) == first)


_Handler: Callable[..., Any] = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_handler = _Handler(_on_fault)

if _SUPPORTED:
    # A child of a process with threads must not find the lock held by a thread that it does not have.
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
