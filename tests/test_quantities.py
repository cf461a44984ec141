"""bigmerge.quantities: amounts that people write and read."""

from __future__ import annotations

import pytest

from bigmerge.errors import UsageError
from bigmerge.quantities import format_bytes, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", 1), (7, 7), ("1b", 1), ("5GB", 5 * 10**9), ("256MiB", 256 << 20), ("1.5G", 3 << 29), ("2k", 2048),
        (" 64 mib ", 64 << 20), (".5KiB", 512), ("3TB", 3 * 10**12), ("1PiB", 1 << 50),
    ],
)  # fmt: skip
def test_parse_bytes(text: str | int, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["", "MiB", "-1", "0", "0GB", "1x", "1 2", "1e3", "0.4", "nan", "١MiB", 0, -5, "1.2.3"]
)
def test_what_is_no_amount(text: str | int) -> None:
    with pytest.raises(UsageError, match="no amount of memory"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"), (999, "999 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (1023 * 1024, "1023 KiB"),
        (256 << 20, "256 MiB"), (5 << 40, "5 TiB"), (2000 << 40, "2000 TiB"), (123456789, "118 MiB"),
    ],
)  # fmt: skip
def test_format_bytes(count: int, expected: str) -> None:
    assert format_bytes(count) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0, "0.0 s"), (4.24, "4.2 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_format_seconds(seconds: float, expected: str) -> None:
    assert format_seconds(seconds) == expected
