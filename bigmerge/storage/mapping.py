"""Input files, memory-mapped in windows that are populated before use and released after it.

Populating a window first (`MADV_POPULATE_READ`, Linux 5.14) reads it in large requests, and turns a file that
was truncated meanwhile into an ordinary error where touching the page would be a SIGBUS. Older kernels fall
back to read-ahead advice and page faults.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

from bigmerge.errors import CheckpointError

_POPULATE_READ = 22  # linux/mman.h; not in Python's mmap module
_PAGE = mmap.PAGESIZE
#: A fault maps the whole large folio that a page lies in, up to this much on either side of what was asked for.
#: Releasing only what was asked for would leave the rest behind, a large share of everything that is read.
FOLIO = 2 << 20

# Through ctypes and not mmap.madvise, which holds the interpreter lock while the kernel reads.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.madvise.restype = ctypes.c_int


class MappedFile:
    """One input file, mapped read-only as a whole (address space only; pages come and go by window).

    Attributes:
        path: the file.
        buffer: the mapping, for `torch.frombuffer`; empty files have an empty buffer.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._populate = True
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened ({error.strerror})", file=str(path)) from error
        try:
            self.nbytes = os.fstat(descriptor).st_size
            self.buffer: mmap.mmap | bytes = (
                mmap.mmap(descriptor, self.nbytes, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)
                if self.nbytes
                else b""
            )
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be memory-mapped ({error.strerror})", file=str(path)
            ) from error
        finally:
            os.close(descriptor)
        self._address = _address(self.buffer) if isinstance(self.buffer, mmap.mmap) else 0

    def populate(self, start: int, nbytes: int) -> None:
        """Bring the bytes into memory.

        Raises:
            CheckpointError: the file has become shorter or the device reports an error.
        """
        if nbytes == 0:
            return
        if start + nbytes > self.nbytes:
            raise CheckpointError(f"{self.path}: ends before byte {start + nbytes}", file=str(self.path))
        if self._populate:
            code = self._advise(start, nbytes, _POPULATE_READ)
            if code == 0:
                return
            if code != errno.EINVAL:
                raise CheckpointError(
                    f"{self.path}: bytes {start} to {start + nbytes} cannot be read ({os.strerror(code)})",
                    hint="the file was truncated or changed during the run, or the disk has an error",
                    file=str(self.path),
                )
            self._populate = False
        self._advise(start, nbytes, mmap.MADV_WILLNEED)

    def read_ahead(self, start: int, nbytes: int) -> None:
        """Have the kernel begin to read the bytes, without waiting."""
        if nbytes:
            self._advise(start, nbytes, mmap.MADV_WILLNEED)

    def release(self, start: int, nbytes: int) -> None:
        """Take the bytes out of this process's resident memory (the kernel may keep them cached)."""
        if nbytes:
            first = start // FOLIO * FOLIO
            end = -(-(start + nbytes) // FOLIO) * FOLIO
            self._advise(first, min(end, self.nbytes) - first, mmap.MADV_DONTNEED)

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


class Mappings:
    """Mapped files by path.

    Raises:
        CheckpointError: a file cannot be opened or mapped.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._files = {path: MappedFile(path) for path in dict.fromkeys(paths)}

    def __getitem__(self, path: Path) -> MappedFile:
        return self._files[path]
