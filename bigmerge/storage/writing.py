"""Writes the files of a planned checkpoint: headers first, space reserved, data anywhere in any order."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bigmerge.checkpoints.checkpoint import SAFETENSORS_INDEX
from bigmerge.checkpoints.layout import Layout
from bigmerge.errors import OutputError
from bigmerge.storage.buffers import ALIGNMENT, address
from bigmerge.storage.descriptors import allow_open_files

_START_WRITEBACK = 2  # SYNC_FILE_RANGE_WRITE: begin writing dirty pages, do not wait
_libc = ctypes.CDLL(None, use_errno=True)


class CheckpointWriter:
    """The files of `layout` in `directory`. Safe to call from several threads.

    Use as a context manager or call `close`.

    Args:
        direct: write past the page cache (O_DIRECT) what lies in memory as it will lie in its file, counted
            in `ALIGNMENT`s. All else, and everything where the file system cannot do that, is written through it.
    """

    def __init__(self, directory: Path, layout: Layout, *, direct: bool = False) -> None:
        self.directory = directory
        self.layout = layout
        self._descriptors: dict[int, int] = {}
        self._direct = direct
        self._direct_descriptors: dict[int, int] = {}
        allow_open_files((1 + direct) * len(layout.shards))

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def open(self) -> None:
        """Open the files that another process has created.

        Raises:
            OutputError: they are not there.
        """
        for number, shard in enumerate(self.layout.shards):
            path = self.directory / shard.filename
            with output_errors(path):
                self._descriptors[number] = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            self._open_direct(number, path)

    def _open_direct(self, number: int, path: Path) -> None:
        if not self._direct:
            return
        try:
            self._direct_descriptors[number] = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            self._direct = False
            if error.errno != errno.EINVAL:  # a file system that has no such writes
                with output_errors(path):
                    raise

    def create(self) -> None:
        """Open every file, reserve its space on the disk and write its header and the index.

        Data that an earlier run left in a file is kept.

        Raises:
            OutputError: the disk is full or refuses.
        """
        for number, shard in enumerate(self.layout.shards):
            path = self.directory / shard.filename
            with output_errors(path):
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                self._descriptors[number] = descriptor
                if os.fstat(descriptor).st_size != shard.nbytes:
                    os.ftruncate(descriptor, shard.nbytes)
                try:
                    os.posix_fallocate(descriptor, 0, shard.nbytes)
                except OSError as error:
                    if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                        raise
                _write_all(descriptor, shard.header, 0)
            self._open_direct(number, path)
        index = self.layout.index()
        if index is not None:
            write_json(self.directory / SAFETENSORS_INDEX, index)

    def write(self, name: str, offset: int, data: bytes | memoryview) -> None:
        """Write `data` at byte `offset` of the tensor `name`, or have the kernel start storing it.

        Raises:
            OutputError: the disk is full or reports an error.
        """
        number, position = self.layout.place(name, offset)
        view = memoryview(data).cast("B")
        with output_errors(self.directory / self.layout.shards[number].filename):
            head = -position % ALIGNMENT
            body = max(0, len(view) - head) // ALIGNMENT * ALIGNMENT
            if self._direct and body and not view.readonly and address(view[head:]) % ALIGNMENT == 0:
                self._write_cached(number, view[:head], position)
                written = self._write_direct(number, view[head : head + body], position + head)
                view, position = view[head + written :], position + head + written
            self._write_cached(number, view, position)

    def _write_direct(self, number: int, view: memoryview, position: int) -> int:
        """Write whole blocks past the page cache; returns how many bytes the file system has taken that way."""
        done = 0
        while done < len(view) and done % ALIGNMENT == 0:
            try:
                done += os.pwrite(self._direct_descriptors[number], view[done:], position + done)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._direct = False
                break
        return done

    def _write_cached(self, number: int, view: memoryview, position: int) -> None:
        if view:
            _write_all(self._descriptors[number], view, position)
            start_writeback(self._descriptors[number], position, len(view))

    def read(self, name: str, offset: int, nbytes: int) -> bytes:
        """The `nbytes` bytes at byte `offset` of the tensor `name` as they are stored now.

        Raises:
            OutputError: the disk reports an error.
        """
        number, start = self.layout.place(name, offset)
        data = bytearray(nbytes)
        done = 0
        with output_errors(self.directory / self.layout.shards[number].filename):
            while done < nbytes:
                count = os.preadv(self._descriptors[number], [memoryview(data)[done:]], start + done)
                if count == 0:
                    raise OSError(errno.EIO, "it is shorter than it was made")
                done += count
        return bytes(data)

    def sync(self, names: Iterable[str] | None = None) -> None:
        """Wait until the files that hold `names` (default: all) are on the disk.

        Raises:
            OutputError: the disk reports an error.
        """
        numbers = (
            sorted(self._descriptors)
            if names is None
            else sorted({self.layout.shard_of[name] for name in names})
        )
        for number in numbers:
            with output_errors(self.directory / self.layout.shards[number].filename):
                os.fdatasync(self._descriptors[number])

    def close(self) -> None:
        """Close the files; the data may still be on its way to the disk unless `sync` was called."""
        for descriptors in (self._descriptors, self._direct_descriptors):
            for descriptor in descriptors.values():
                os.close(descriptor)
            descriptors.clear()


def start_writeback(descriptor: int, position: int, nbytes: int) -> None:
    """Have the kernel begin to store these bytes of an open file, without waiting.

    Only a hint: where it is missing, the data waits for the next sync.
    """
    with contextlib.suppress(AttributeError):
        _libc.sync_file_range(
            descriptor, ctypes.c_int64(position), ctypes.c_int64(nbytes), ctypes.c_uint(_START_WRITEBACK)
        )


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, replacing `path` at once and durably."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, replacing it at once and durably.

    Raises:
        OutputError: the disk is full or refuses.
    """
    temporary = path.with_name(path.name + ".tmp")
    with output_errors(path):
        # Names of files need not be UTF-8; in JSON their escaped bytes are read back as they were.
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def sync_directory(path: Path) -> None:
    """Wait until the directory's entries are on the disk.

    Raises:
        OutputError: the disk reports an error.
    """
    sync_path(path)


def sync_path(path: Path) -> None:
    """Wait until a file's content, or a directory's entries, are on the disk.

    Raises:
        OutputError: the disk reports an error.
    """
    with output_errors(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_all(descriptor: int, data: bytes | memoryview, position: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, position)  # at most 2 GiB a call, fewer when interrupted
        view = view[written:]
        position += written


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Within the block an error of the disk becomes an OutputError about `path`."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise OutputError(
            f"{path}: cannot be written ({error.strerror})",
            hint="free space, then run the same command again: it goes on where it stopped" if full else None,
            file=str(path),
            errno=error.errno,
        ) from error
