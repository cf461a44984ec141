"""bigmerge.storage.buffers: memory that direct reads and writes take."""

from __future__ import annotations

import random

import pytest

from bigmerge.storage.buffers import ALIGNMENT, HUGE_PAGE, address, aligned, allocate, allocated_bytes


@pytest.mark.parametrize("count", [0, 1, 7])
def test_buffers_lie_apart_and_on_pages(count: int) -> None:
    generator = random.Random(count)
    sizes = [generator.choice([0, 1, ALIGNMENT, ALIGNMENT + 1, HUGE_PAGE + 5]) for _ in range(count)]
    buffers = allocate(sizes)
    assert [len(buffer) for buffer in buffers] == sizes
    for number, buffer in enumerate(buffers):
        assert not any(buffer[:100]), "it is zero at first"
        buffer[:] = bytes([number + 1]) * len(buffer)
    for number, buffer in enumerate(buffers):
        assert buffer.tobytes() == bytes([number + 1]) * len(buffer), "others do not show in it"
        if buffer:
            assert address(buffer) % ALIGNMENT == 0


def test_large_ones_begin_at_a_huge_page() -> None:
    first, second = allocate([HUGE_PAGE, 3])
    assert address(first) % HUGE_PAGE == 0
    assert address(second) == address(first) + HUGE_PAGE


def test_what_they_cost() -> None:
    assert [aligned(nbytes) for nbytes in (0, 1, ALIGNMENT, ALIGNMENT + 1)] == [
        0, ALIGNMENT, ALIGNMENT, 2 * ALIGNMENT
    ]  # fmt: skip
    assert allocated_bytes([]) == 0
    assert allocated_bytes([1, 1]) == 2 * ALIGNMENT
    assert allocated_bytes([HUGE_PAGE, 1]) == 2 * HUGE_PAGE, "the last huge page is taken whole"
