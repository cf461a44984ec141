"""A memory control group, its page cache counted, to run commands in (cgroup v1 or v2; needs the right to make one)."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")
_ENTER = (
    "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); os.execvp(sys.argv[2], sys.argv[2:])"
)


class MemoryGroup:
    """A group limited to `nbytes` bytes; a context manager that removes it.

    Raises:
        OSError: it cannot be made here.
    """

    def __init__(self, nbytes: int) -> None:
        second = (_V2 / "cgroup.controllers").exists()
        self.path = (_V2 if second else _V1) / f"bigmerge-benchmark-{os.getpid()}"
        self.path.mkdir()
        try:
            if second:
                (self.path / "memory.max").write_text(str(nbytes))
                (self.path / "memory.swap.max").write_text("0")
            else:
                (self.path / "memory.limit_in_bytes").write_text(str(nbytes))
        except OSError:
            self.path.rmdir()
            raise

    def launcher(self) -> list[str]:
        """What to put before a command that is to run in the group."""
        return [sys.executable, "-c", _ENTER, str(self.path / "cgroup.procs")]

    def __enter__(self) -> MemoryGroup:
        return self

    def __exit__(self, *exception: object) -> None:
        for _ in range(50):  # it is busy until its processes are gone
            try:
                self.path.rmdir()
                return
            except OSError:
                time.sleep(0.1)
