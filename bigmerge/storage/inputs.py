"""The input files of a run, opened in the way that was asked for or the nearest that works."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from bigmerge.storage.descriptors import allow_open_files
from bigmerge.storage.mapping import MappedFile
from bigmerge.storage.reading import IO, BufferedFile, DirectFile, InputFile

log = logging.getLogger("bigmerge.storage")


class InputFiles:
    """Input files by path; a context manager.

    Args:
        paths: the files; each is opened once.
        io: how to read them. If that does not work for one of them, all are read by way of "pread".

    Attributes:
        io: how they are read.

    Raises:
        CheckpointError: a file cannot be opened.
    """

    def __init__(self, paths: Iterable[Path], io: IO) -> None:
        paths = list(dict.fromkeys(paths))
        allow_open_files(len(paths))
        self.io = io
        self._files: dict[Path, InputFile] = {}
        try:
            try:
                self._open(paths, {"mmap": MappedFile, "pread": BufferedFile, "direct": DirectFile}[io])
            except OSError as error:
                if io == "pread":
                    raise
                log.warning("--io %s does not work here (%s); reading by pread instead", io, error)
                self.close()
                self.io = "pread"
                self._open(paths, lambda path: BufferedFile(path, keep_cached=io != "direct"))
        except BaseException:
            self.close()
            raise

    def _open(self, paths: Iterable[Path], kind: Callable[[Path], InputFile]) -> None:
        for path in paths:
            self._files[path] = kind(path)

    def __getitem__(self, path: Path) -> InputFile:
        return self._files[path]

    def __enter__(self) -> InputFiles:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every file."""
        for file in self._files.values():
            file.close()
        self._files.clear()
