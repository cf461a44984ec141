"""Byte counts and durations, read from and written for people."""

from __future__ import annotations

import re

from bigmerge.errors import UsageError

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgtp", start=1):
    _UNITS[_letter + "b"] = 1000**_power
    _UNITS[_letter + "ib"] = 1024**_power
    _UNITS[_letter] = 1024**_power


def parse_bytes(text: str | int) -> int:
    """Bytes in `text`: a number with an optional unit (`64MiB`, `5GB`, `1.5G`; a bare letter is binary).

    Raises:
        UsageError: the text is no positive amount.
    """
    if isinstance(text, int):
        text = f"{text}B"
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    unit = match.group(2).lower() if match else ""
    if match is None or unit not in _UNITS or float(match.group(1)) * _UNITS[unit] < 1:
        raise UsageError(
            f"{text!r} is no amount of memory", hint="write it as 256MiB, 2GiB or 5GB", text=text
        )
    return int(float(match.group(1)) * _UNITS[unit])


def format_bytes(count: float) -> str:
    """`count` bytes with a binary unit and three significant digits."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return (
                f"{count:.0f} B"
                if unit == "B"
                else f"{count:.3g} {unit}"
                if count < 1000
                else f"{count:.0f} {unit}"
            )
        count /= 1024
    raise AssertionError("unreachable")


def format_seconds(seconds: float) -> str:
    """`seconds` as 4.2 s, 3 min 20 s or 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"
