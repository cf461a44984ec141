"""Progress on standard error, in one look for everything that takes long."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(*, total: int, unit: str, desc: str, done: int = 0, show: bool = True) -> tqdm[Any]:
    """A bar over `total` units (bytes are scaled binarily), starting at `done`.

    On a terminal it is redrawn twice a second; in a log file it writes a line every 30 seconds.
    """
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=done,
        unit=unit,
        unit_scale=unit == "B",
        unit_divisor=1024 if unit == "B" else 1000,
        desc=desc,
        file=sys.stderr,
        disable=not show,
        mininterval=0.5 if terminal else 30.0,
        dynamic_ncols=terminal,
        leave=True,
    )
