"""Input files, memory-mapped in windows that are populated before use and released after it.

Populating a window first (`MADV_POPULATE_READ`, Linux 5.14) reads it in large requests, and turns a file that
was truncated before into an ordinary error. Older kernels fall back to read-ahead advice and page faults. A file
that is truncated between being populated and being read is found when its window is released
(`bigmerge.storage.bus_errors`).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from pathlib import Path

from bigmerge.errors import CheckpointError
from bigmerge.storage.bus_errors import watch_mapping
from bigmerge.storage.reading import InputFile, ends_early, open_input

_POPULATE_READ = 22  # linux/mman.h; not in Python's mmap module
_PAGE = mmap.PAGESIZE
#: A fault maps the whole large folio that a page lies in, up to this much on either side of what was asked for.
#: Releasing only what was asked for would leave the rest behind, a large share of everything that is read.
FOLIO = 2 << 20

# Through ctypes and not mmap.madvise, which holds the interpreter lock while the kernel reads.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.madvise.restype = ctypes.c_int


class MappedFile(InputFile):
    """One input file, mapped read-only as a whole (address space only; pages come and go by window).

    Raises:
        OSError: the file system cannot map files.
        CheckpointError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._populate = True
        self._descriptor, self.nbytes = open_input(path)
        try:
            self._mapping: mmap.mmap | bytes = (
                mmap.mmap(self._descriptor, self.nbytes, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)
                if self.nbytes
                else b""
            )
        except OSError:
            os.close(self._descriptor)
            raise
        self._view = memoryview(self._mapping)
        self._address = _address(self._mapping) if isinstance(self._mapping, mmap.mmap) else 0
        self._watch = watch_mapping(self._address, self.nbytes)

    def read_ahead(self, start: int, nbytes: int) -> None:
        if nbytes:
            self._advise(start, nbytes, mmap.MADV_WILLNEED)

    def read(self, start: int, nbytes: int, buffer: memoryview | None = None) -> memoryview:
        del buffer
        if start + nbytes > self.nbytes:
            raise ends_early(self.path, start + nbytes)
        if nbytes:
            self._bring(start, nbytes)
        return self._view[start : start + nbytes]

    def _bring(self, start: int, nbytes: int) -> None:
        """Populate the pages."""
        if self._populate:
            code = self._advise(start, nbytes, _POPULATE_READ)
            if code == 0:
                return
            if code != errno.EINVAL:
                raise self._unreadable(start, nbytes, os.strerror(code))
            self._populate = False
        self._advise(start, nbytes, mmap.MADV_WILLNEED)

    def release(self, start: int, nbytes: int) -> None:
        if nbytes:
            first = start // FOLIO * FOLIO
            end = -(-(start + nbytes) // FOLIO) * FOLIO
            self._advise(first, min(end, self.nbytes) - first, mmap.MADV_DONTNEED)
        # What lies behind a new end reads as zeros within its page, and is a fault beyond.
        if os.fstat(self._descriptor).st_size < start + nbytes:
            raise ends_early(self.path, start + nbytes)
        if self._watch.broken:
            raise self._unreadable(start, nbytes, "a page was missing when it was used")

    def _unreadable(self, start: int, nbytes: int, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: bytes {start} to {start + nbytes} cannot be read ({reason})",
            hint="the file was truncated or changed during the run, or the disk has an error; when it is "
            "mended, run the same command again",
            file=str(self.path),
        )

    def close(self) -> None:
        self._watch.close()
        os.close(self._descriptor)
        self._view.release()
        if isinstance(self._mapping, mmap.mmap):
            # Where a tensor still looks at it, it goes with that tensor.
            with contextlib.suppress(BufferError):
                self._mapping.close()

    def _advise(self, start: int, nbytes: int, advice: int) -> int:
        first = start // _PAGE * _PAGE
        last = min(-(-(start + nbytes) // _PAGE) * _PAGE, -(-self.nbytes // _PAGE) * _PAGE)
        if _libc.madvise(self._address + first, last - first, advice) == 0:
            return 0
        return ctypes.get_errno()


def _address(mapping: mmap.mmap) -> int:
    # A read-only buffer gives its address only through the buffer protocol itself.
    view = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(mapping), ctypes.byref(view), 0)
    address = view.buf
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(view))
    assert address is not None
    return int(address)


class _PyBuffer(ctypes.Structure):
    """The C struct Py_buffer, of which only `buf` is read here."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )
