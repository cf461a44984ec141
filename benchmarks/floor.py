"""The least a merge can take: read every input, write and sync as many bytes as the output, no arithmetic.

Run as `python -m benchmarks.floor THREADS OUTPUT_BYTES OUTPUT INPUT...`; prints its own seconds.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from bigmerge.storage.writing import start_writeback

_PIECE = 4 << 20
_AHEAD = 6  # pieces that each thread has the kernel read in advance


def main(threads: int, output_bytes: int, output: str, inputs: list[str]) -> None:
    """Read and write with `threads` threads, each alternating between its pieces of both."""
    files = [file for name in inputs for file in sorted(Path(name).rglob("*.safetensors"))]
    total = sum(file.stat().st_size for file in files)
    started = time.perf_counter()
    out = os.open(output, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    os.posix_fallocate(out, 0, output_bytes)
    pieces = iter(_pieces(files))
    lock = threading.Lock()
    position = [0]
    descriptors = {file: os.open(file, os.O_RDONLY) for file in files}

    def take() -> tuple[int, int, int, int] | None:
        """The next piece as (place among all input bytes, descriptor, offset, length), its reading begun."""
        with lock:
            piece = next(pieces, None)
            if piece is None:
                return None
            file, offset, length = piece
            start = position[0]
            position[0] += length
        os.posix_fadvise(descriptors[file], offset, length, os.POSIX_FADV_WILLNEED)
        return start, descriptors[file], offset, length

    def work() -> None:
        buffer = bytearray(_PIECE)
        following = [take() for _ in range(_AHEAD)]
        while piece := following.pop(0):
            following.append(take())
            start, descriptor, offset, length = piece
            view = memoryview(buffer)[:length]
            done = 0
            while done < length:
                done += os.preadv(descriptor, [view[done:]], offset + done)
            first, last = (output_bytes * edge // total for edge in (start, start + length))
            written = first
            while written < last:
                written += os.pwrite(out, view[: last - written], written)
            start_writeback(out, first, last - first)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    os.fsync(out)
    print(time.perf_counter() - started)


def _pieces(files: list[Path]) -> Iterator[tuple[Path, int, int]]:
    """All files' pieces, taken from the files in turn as a merge takes them."""
    sizes = [file.stat().st_size for file in files]
    for offset in range(0, max(sizes), _PIECE):
        for file, size in zip(files, sizes, strict=True):
            if offset < size:
                yield file, offset, min(_PIECE, size - offset)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
