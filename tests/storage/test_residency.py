"""bigmerge.storage.residency: when reading past the page cache is worth it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bigmerge.storage import residency
from bigmerge.storage.residency import are_cold

MIB = 1 << 20


@pytest.fixture
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What stands for /sys/dev/block; the files of these tests are on its only disk, once `attach` was called."""
    root = tmp_path / "sys"
    (root / "dev").mkdir(parents=True)
    monkeypatch.setattr(residency, "_BLOCK_DEVICES", root / "dev")
    return root


def attach(
    devices: Path, files: Path, *, rotational: str, bus: str = "pci0", partition: bool = False
) -> None:
    disk = devices / bus / "disk"
    (disk / "queue").mkdir(parents=True)
    (disk / "queue" / "rotational").write_text(rotational + "\n")
    (disk / "part1").mkdir()
    number = files.stat().st_dev
    link = devices / "dev" / f"{os.major(number)}:{os.minor(number)}"
    link.symlink_to(disk / "part1" if partition else disk)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "large", tmp_path / "small"]
    for path, size in zip(paths, (12 * MIB, 4 * MIB), strict=True):
        path.write_bytes(bytes(size))
    return paths


def answer(monkeypatch: pytest.MonkeyPatch, cached: set[str]) -> list[tuple[str, int]]:
    """Have exactly the files of these names be cached; what is asked is put down."""
    asked: list[tuple[str, int]] = []

    def is_cached(descriptor: int, position: int) -> bool:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        asked.append((name, position))
        return name in cached

    monkeypatch.setattr(residency, "_is_cached", is_cached)
    return asked


@pytest.mark.parametrize(
    ("cached", "cold"), [(set(), True), ({"small"}, True), ({"large"}, False), ({"large", "small"}, False)]
)
def test_most_of_all_bytes_counts(
    devices: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch, cached: set[str], cold: bool
) -> None:
    attach(devices, files[0], rotational="0")
    asked = answer(monkeypatch, cached)
    assert are_cold(files) == cold
    assert {name for name, _ in asked} == {"large", "small"}
    assert all(0 <= position < (12 * MIB if name == "large" else 4 * MIB) for name, position in asked)
    assert 64 <= len(asked) <= 66
    assert 40 <= sum(name == "large" for name, _ in asked) <= 56, "by their sizes"


@pytest.mark.parametrize(
    ("rotational", "bus", "partition", "suits"),
    [
        ("0", "pci0", False, True),
        ("0", "pci0", True, True),
        ("1", "pci0", False, False),
        ("1", "pci0", True, False),
        ("1", "virtio3", True, True),
    ],
)
def test_which_disks_suit(
    devices: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch,
    rotational: str, bus: str, partition: bool, suits: bool,
) -> None:  # fmt: skip
    answer(monkeypatch, set())
    assert not are_cold(files), "no disk is known"
    attach(devices, files[0], rotational=rotational, bus=bus, partition=partition)
    assert are_cold(files) == suits


def test_nothing_is_cold_where_it_cannot_be_known(
    devices: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    attach(devices, files[0], rotational="0")
    assert not are_cold([])
    assert not are_cold([*files, files[0].with_name("nothing")])

    def unsupported(*arguments: object) -> int:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "preadv", unsupported)
    assert not are_cold(files)


def test_what_was_just_written_is_cached_until_it_is_dropped(devices: Path, files: list[Path]) -> None:
    attach(devices, files[0], rotational="0")
    assert not are_cold(files)
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if not are_cold(files):
        pytest.skip("this file system keeps its files in memory")
    assert are_cold(files), "asking brings next to nothing into the cache"
    for path in files:
        path.read_bytes()
    assert not are_cold(files)
