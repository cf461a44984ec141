"""Runs commands in processes of their own, alternating, and sets their medians beside each other."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

#: seconds that a command reports of its own work, and its profile; None where it reports none
Result = tuple[float | None, Any]


@dataclass
class Runs:
    """What repeated runs of one command took.

    Attributes:
        wall: seconds of the whole process.
        inner: seconds that the command reports of its own work, without imports; empty if it reports none.
        peak: peak resident bytes of the process.
        profiles: what the command says of where its time went.
    """

    wall: list[float] = field(default_factory=list)
    inner: list[float] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)
    profiles: list[Any] = field(default_factory=list)

    def extend(self, other: Runs) -> None:
        """Add another's runs."""
        for name in ("wall", "inner", "peak", "profiles"):
            getattr(self, name).extend(getattr(other, name))

    @property
    def seconds(self) -> float:
        """Median of the work itself: the inner seconds where there are any."""
        return statistics.median(self.inner or self.wall)

    @property
    def peak_bytes(self) -> int:
        return max(self.peak)

    def as_json(self) -> dict[str, Any]:
        told = {"wall_s": self.wall, "inner_s": self.inner, "peak_bytes": self.peak, "median_s": self.seconds}
        return told | ({"profiles": self.profiles} if self.profiles else {})


def run(
    command: Sequence[str],
    *,
    inner: Callable[[str], Any] | None = None,
    environment: Mapping[str, str] = {},
) -> tuple[float, Any, int]:
    """(wall seconds, what `inner` makes of the output, peak resident bytes) of one command; its output must be small.

    Raises:
        SystemExit: the command failed.
    """
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    output = process.stdout.read()
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors}")
    return wall, inner(output) if inner else None, usage.ru_maxrss * 1024


def record(runs: Runs, result: tuple[float, Any, int]) -> None:
    """Add one `run` to `runs`."""
    wall, inner, peak = result
    runs.wall.append(wall)
    runs.peak.append(peak)
    seconds, profile = inner if isinstance(inner, tuple) else (inner, None)
    if seconds is not None:
        runs.inner.append(seconds)
    if profile is not None:
        runs.profiles.append(profile)


def wait_for_quiet(most: float = 120.0) -> None:
    """Wait until what earlier commands have written is on the disk."""
    os.sync()
    deadline = time.monotonic() + most
    while time.monotonic() < deadline:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        if sizes["Dirty"] + sizes["Writeback"] < 16384:
            return
        time.sleep(0.2)


def read_into_cache(paths: Iterable[Path]) -> None:
    """Have the files in the page cache."""
    for path in paths:
        for file in path.rglob("*.safetensors"):
            with file.open("rb", buffering=0) as stream:
                while stream.read(1 << 24):
                    pass


def drop_from_cache(paths: Iterable[Path]) -> None:
    """Have the kernel forget the files' cached pages, so that the next reader goes to the disk."""
    os.sync()
    for path in paths:
        for file in [path] if path.is_file() else path.rglob("*"):
            if file.is_file():
                descriptor = os.open(file, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


def bare_peak() -> int:
    """Peak resident bytes of the interpreter with torch imported: what every figure of memory is above."""
    return run([sys.executable, "-c", "import torch, numpy"])[2]


def surroundings() -> dict[str, Any]:
    """Machine, versions, date and command, for the report."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": date.today().isoformat(),
        "command": " ".join(["python", "-m", *sys.orig_argv[2:]]) if "-m" in sys.orig_argv else sys.argv,
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, {memory / 2**30:.0f} GiB",
        "system": platform.system() + " " + platform.release().split("-")[0],
        "python": platform.python_version(),
        **{name: version(name) for name in ("bigmerge", "torch", "transformers", "safetensors")},
    }


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under a header in aligned columns, the first to the left."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def save(path: Path | None, report: Mapping[str, Any]) -> None:
    """Write the report as JSON, if a path was asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n")
        print(f"report: {path}", file=sys.stderr)
