"""What one hostile input may do at most: raise bigmerge's own errors, soon, in little memory, in its own place."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bigmerge.errors import BigmergeError

_SECONDS = 60.0
_MORE_BYTES = 512 << 20
#: audit events that name a file, and how many of their arguments do; those with a directory's descriptor have it last
_EVENTS = {
    "open": 1,
    "os.listdir": 1,
    "os.scandir": 1,
    "os.mkdir": 1,
    "os.rename": 2,
    "os.remove": 1,
    "os.rmdir": 1,
    "os.truncate": 1,
    "os.link": 2,
    "os.symlink": 2,
    "shutil.rmtree": 1,
    "shutil.copyfile": 2,
}
_RELATIVE = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}
#: what any program may look at, whoever names it
_HARMLESS = tuple(
    {
        *(os.path.realpath(path) + "/" for path in sysconfig.get_paths().values()),
        os.path.dirname(os.path.realpath(os.__file__)) + "/",
        str(Path(__file__).resolve().parents[2] / "bigmerge") + "/",
        "/proc/",
        "/sys/",
        "/dev/",
    }
)


class Escape(AssertionError):
    """A file was touched that has nothing to do with the input."""


class Hang(BaseException):
    """One input took longer than any may. No Exception: what waits for threads would keep it until they end."""


_allowed: tuple[str, ...] | None = None
_escaped: list[str] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _allowed is None or event not in _EVENTS:
        return
    for target in arguments[: _EVENTS[event]]:
        if not isinstance(target, (str, bytes, os.PathLike)):
            continue
        name = os.fsdecode(target)
        if event in _RELATIVE and arguments[-1] >= 0:
            name = os.path.join(os.readlink(f"/proc/self/fd/{arguments[-1]}"), name)
        path = os.path.realpath(name)
        above = any(allowed.startswith(path + "/") for allowed in _allowed)  # opened to sync it
        if not (path + "/").startswith((*_allowed, *_HARMLESS)) and not (event == "open" and above):
            _escaped.append(f"{event} {path}")


sys.addaudithook(_audit)  # for good; it costs a comparison where nothing is guarded


@contextlib.contextmanager
def guarded(*directories: Path) -> Iterator[None]:
    """Run one input; bigmerge's own errors end it, and are what is hoped for.

    Args:
        directories: where files may be read and written.

    Raises:
        Escape: a file elsewhere was touched.
        Hang: it took too long.
        MemoryError: it asked for more memory than any input of a few kilobytes is worth.
    """
    global _allowed
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    before = signal.signal(signal.SIGALRM, _too_long)
    told = "nothing to complain of"
    _escaped.clear()
    _allowed = tuple(f"{directory.resolve()}/" for directory in directories)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _MORE_BYTES, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    try:
        yield
    except BigmergeError as error:
        told = error.message
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        _allowed = None
        signal.signal(signal.SIGALRM, before)
    assert told
    if _escaped:
        raise Escape("; ".join(_escaped))


def _too_long(number: int, frame: object) -> None:
    raise Hang(f"not done after {_SECONDS:g} seconds")
