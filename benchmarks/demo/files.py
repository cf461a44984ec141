"""Files and directories that are either wholly there or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by a file with `text`; a crash leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def fresh_directory(path: Path) -> Iterator[Path]:
    """A new directory to fill; it takes the place of `path` when the block ends without an exception."""
    # not beside `path`: a half-written model must never be picked up by `shards/*`
    temporary = path.parent.with_name(path.parent.name + ".unfinished") / path.name
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    remove(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.rename(path)


def remove(path: Path) -> None:
    """Remove the directory or file `path` if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_record(path: Path) -> dict[str, Any] | None:
    """The JSON object stored in `path`; None if there is none or it is damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None
