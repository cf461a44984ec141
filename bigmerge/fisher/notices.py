"""What the processes of an estimate tell each other while they are busy, and what they do about memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bigmerge.errors import ResourceError
from bigmerge.processes import Group, read_error, write_error

_POLL = 0.05


class Notices:
    """Small files through which processes that are busy with examples tell each other that they ended.

    A collective would block: a process that waits in one cannot react to a signal, and GPU collectives give
    up after a while, though one process may finish long before another.
    """

    def __init__(self, directory: Path, group: Group) -> None:
        self._directory = directory
        self._group = group

    def clear(self) -> None:
        """Forget what an earlier run left. For one process, before the others start."""
        self._directory.mkdir(parents=True, exist_ok=True)
        for path in self._directory.glob("rank-*"):
            path.unlink()

    def done(self) -> None:
        """Say that this process is through with its examples."""
        self._path("done", self._group.rank).touch()

    def failed(self, error: Exception) -> None:
        """Say that this process cannot go on, and why."""
        write_error(self._path("error", self._group.rank), error)

    def check(self) -> None:
        """Look whether another process has failed.

        Raises:
            BigmergeError: it has; this is its error.
        """
        if self._group.world == 1:
            return
        for path in sorted(self._directory.glob("rank-*.error")):
            if path != self._path("error", self._group.rank):
                raise read_error(path)

    def wait(self, tick: Callable[[], None]) -> None:
        """Wait until every process is through, calling `tick` now and then.

        Raises:
            BigmergeError: a process has failed; or whatever `tick` raises.
        """
        while any(not self._path("done", rank).exists() for rank in range(self._group.world)):
            tick()
            self.check()
            time.sleep(_POLL)

    def _path(self, kind: str, rank: int) -> Path:
        return self._directory / f"rank-{rank}.{kind}"


@contextmanager
def device_memory(what: str) -> Iterator[None]:
    """Within the block, too little memory on the device is one clear error about `what`.

    Raises:
        ResourceError: there is too little.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"the device's memory does not hold {what}",
            hint="use a smaller --batch-size, --memory or --max-length, or --cpu",
        ) from error
