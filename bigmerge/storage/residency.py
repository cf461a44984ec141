"""Where files are: on a local disk or elsewhere, in the page cache already or not."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path

_BLOCK_DEVICES = Path("/sys/dev/block")
#: what the drivers of virtual machines' disks are called there
_VIRTUAL = ("virtio", "vbd-", "VMBUS")
#: places that are looked at, over all files together
_SAMPLES = 64


def on_local_disk(path: Path) -> bool:
    """Whether a file or directory is on a local disk without moving parts, where data moves faster past the page cache.

    False wherever that is not sure: file systems over a network, of several layers, or in memory.
    """
    try:
        return _is_solid_state(path.stat().st_dev)
    except OSError:
        return False


def are_cold(paths: Sequence[Path]) -> bool:
    """Whether all files are on such disks and can be read directly, and most of them is not in the page cache."""
    try:
        sizes = [path.stat().st_size for path in paths]
        if not sum(sizes) or not all(map(on_local_disk, paths)):
            return False
        places = random.Random()  # other places every time: what is looked at is in the cache the next time
        cached = looked = 0
        for path, size in zip(paths, sizes, strict=True):
            count = -(-_SAMPLES * size // sum(sizes))
            os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT))  # some file systems cannot
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                # The kernel must not take this for the beginning of a long read.
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
                cached += sum(_is_cached(descriptor, places.randrange(size)) for _ in range(count))
                looked += count
            finally:
                os.close(descriptor)
        return 2 * cached < looked
    except (OSError, AttributeError):  # no such file, no such way to ask
        return False


def _is_cached(descriptor: int, position: int) -> bool:
    """Whether a byte can be read without waiting for the disk."""
    try:
        os.preadv(descriptor, [bytearray(1)], position, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    return True


def _is_solid_state(device: int) -> bool:
    """Whether a device number is that of a local disk, or of a disk's partition, without moving parts."""
    place = (_BLOCK_DEVICES / f"{os.major(device)}:{os.minor(device)}").resolve()
    for disk in (place, place.parent):
        flag = disk / "queue" / "rotational"
        if flag.is_file():
            # Virtual disks say that they rotate, whatever they are made of.
            return flag.read_text(encoding="ascii").strip() == "0" or any(
                part.startswith(_VIRTUAL) for part in disk.parts
            )
    return False
