"""Memory that files are read into and written from past the page cache."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterator, Sequence

#: what direct reads and writes begin and end at, in the file and in memory: a multiple of every block size in use,
#: and whole pages, so that what is written past the page cache and what through it never share one
ALIGNMENT = max(4096, mmap.PAGESIZE)
#: Of ordinary pages the kernel makes requests of 512 KiB to 1 MiB, for each page is an entry in the device's list.
#: In huge pages a request may be as long as the device takes it, which was three times as fast where it was measured.
HUGE_PAGE = 2 << 20


def aligned(nbytes: int) -> int:
    """The least multiple of `ALIGNMENT` that holds `nbytes`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def allocated_bytes(sizes: Sequence[int]) -> int:
    """How much memory `allocate` takes for buffers of these sizes."""
    total = sum(map(aligned, sizes))
    return total if total < HUGE_PAGE else -(-total // HUGE_PAGE) * HUGE_PAGE


def allocate(sizes: Sequence[int]) -> list[memoryview]:
    """Page-aligned buffers of these sizes in bytes, side by side, in huge pages where the system has them."""
    total = allocated_bytes(sizes)
    if not total:
        return [memoryview(b"") for _ in sizes]
    whole = total >= HUGE_PAGE
    # Private, for shared memory has no huge pages by default. What is before and behind is never touched.
    mapping = mmap.mmap(-1, total + (HUGE_PAGE if whole else 0), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Where a page is shared with a forked child, a direct read may go to the child's copy.
    mapping.madvise(mmap.MADV_DONTFORK)
    start = -address(mapping) % HUGE_PAGE if whole else 0
    if whole:
        with contextlib.suppress(OSError):  # a kernel without them
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return list(_cut(memoryview(mapping)[start : start + total], sizes))


def _cut(memory: memoryview, sizes: Sequence[int]) -> Iterator[memoryview]:
    position = 0
    for size in sizes:
        yield memory[position : position + size]
        position += aligned(size)


def address(memory: mmap.mmap | memoryview) -> int:
    """Where writable memory begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
