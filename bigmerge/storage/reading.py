"""Input files, read in windows, in one of three ways (`IO`).

"mmap" maps the file and has the kernel populate each window. "pread" copies each window from the page cache
into a buffer, which suits network file systems and merges of many models in little memory. "direct" reads past
the page cache: nothing is copied, no cached page is made, and nothing that other programs keep cached is swept
out. Where a kernel or file system lacks one of them, the next simpler one takes its place; the bytes are the same.
"""

from __future__ import annotations

import mmap
import os
import stat
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Literal, get_args

from bigmerge.errors import CheckpointError
from bigmerge.storage.buffers import ALIGNMENT, aligned

IO = Literal["mmap", "pread", "direct"]
IO_KINDS: tuple[IO, ...] = get_args(IO)


class InputFile(ABC):
    """One input file, open for reading. Several threads may read at once.

    Attributes:
        path: the file.
        nbytes: its size when it was opened.
    """

    path: Path
    nbytes: int

    @abstractmethod
    def read_ahead(self, start: int, nbytes: int) -> None:
        """Have the kernel begin to read the bytes, without waiting. Only a hint."""

    @abstractmethod
    def read(self, start: int, nbytes: int, buffer: memoryview) -> memoryview:
        """The bytes, to be read only, valid until `release` and until `buffer` is used again.

        Args:
            start, nbytes: what to read.
            buffer: page-aligned memory of at least `buffer_bytes(nbytes)`; some ways of reading need none.

        Raises:
            CheckpointError: the file has changed or the device reports an error.
        """

    @abstractmethod
    def release(self, start: int, nbytes: int) -> None:
        """Let go of bytes that were read.

        Raises:
            CheckpointError: what was read is not what the file held: it was truncated meanwhile.
        """

    @abstractmethod
    def close(self) -> None:
        """Give the file back. Nothing that `read` returned may be used any more."""


class BufferedFile(InputFile):
    """A file whose windows are copied from the page cache into buffers.

    Args:
        path: the file.
        keep_cached: whether what was read may stay in the page cache.
    """

    #: what offsets and lengths of reads are multiples of
    _block = 1

    def __init__(self, path: Path, *, keep_cached: bool = True) -> None:
        self.path = path
        self._keep_cached = keep_cached
        self._descriptor, self.nbytes = open_input(path)

    def read_ahead(self, start: int, nbytes: int) -> None:
        if nbytes:
            os.posix_fadvise(self._descriptor, start, nbytes, os.POSIX_FADV_WILLNEED)

    def read(self, start: int, nbytes: int, buffer: memoryview) -> memoryview:
        before = start % self._block
        whole = aligned(before + nbytes) if self._block > 1 else nbytes
        self._fill(buffer[:whole], start - before, before + nbytes)
        return buffer[before : before + nbytes]

    def _fill(self, window: memoryview, start: int, wanted: int) -> None:
        """Read at least `wanted` bytes from byte `start` into `window`."""
        done = 0
        while done < wanted:
            try:
                count = os.preadv(self._descriptor, [window[done:]], start + done)
            except OSError as error:
                raise CheckpointError(
                    f"{self.path}: bytes {start} to {start + wanted} cannot be read ({error.strerror})",
                    hint="the disk or the network reports an error; run the same command again to go on",
                    file=str(self.path),
                    errno=error.errno,
                ) from error
            before, done = done, done + count
            if done < wanted:
                done -= done % self._block  # a read that ended within a block is begun again at that block
                if done <= before:
                    raise ends_early(self.path, start + wanted)

    def release(self, start: int, nbytes: int) -> None:
        if not self._keep_cached and nbytes:
            os.posix_fadvise(self._descriptor, start, nbytes, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        os.close(self._descriptor)


class DirectFile(BufferedFile):
    """A file that is read past the page cache (O_DIRECT).

    Raises:
        OSError: the file system has no direct reads.
    """

    _block = ALIGNMENT

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        cached = self._descriptor
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        finally:
            os.close(cached)
        try:
            # Some file systems open such files and then refuse to read them.
            with mmap.mmap(-1, ALIGNMENT) as probe:
                os.preadv(self._descriptor, [probe], 0)
        except OSError:
            self.close()
            raise

    def read_ahead(self, start: int, nbytes: int) -> None:
        """Nothing: there is no cache to read into."""


def open_input(path: Path) -> tuple[int, int]:
    """(descriptor, size) of a regular file opened for reading.

    Raises:
        CheckpointError: there is none, or it cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened ({error.strerror})", file=str(path)) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path}: is no regular file", file=str(path))
    return descriptor, status.st_size


def ends_early(path: Path, end: int) -> CheckpointError:
    """The error of a file that ends before byte `end`, which its header promised."""
    return CheckpointError(
        f"{path}: ends before byte {end}",
        hint="the file was truncated or changed during the run; put it back and run the same command again",
        file=str(path),
    )


def buffer_bytes(nbytes: int, io: IO) -> int:
    """How large a buffer for windows of up to `nbytes` bytes must be when files are read by way of `io`."""
    if io == "mmap":
        return 0
    return aligned(nbytes) + (ALIGNMENT if io == "direct" else 0)
