"""How many files this process may have open."""

from __future__ import annotations

import contextlib
import os
import resource

#: what may be opened besides: libraries, pipes, journals
_OTHER_FILES = 256


def allow_open_files(count: int) -> None:
    """Raise this process's own limit of open files, as far as that is allowed, if `count` more come near it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        now = len(os.listdir("/proc/self/fd"))
    except OSError:
        now = 0
    wanted = now + count + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
