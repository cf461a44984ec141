"""The least a merge can take: read every input, write and sync as many bytes as the output, no arithmetic.

Run as `python -m benchmarks.floor THREADS OUTPUT_BYTES OUTPUT INPUT... [--direct]`; prints its own seconds. With
--direct everything goes past the page cache.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from bigmerge.storage.buffers import ALIGNMENT, allocate
from bigmerge.storage.writing import start_writeback

_PIECE = 4 << 20
_AHEAD = 6  # pieces that each thread has the kernel read in advance


def main(threads: int, output_bytes: int, output: str, inputs: list[str], *, direct: bool = False) -> None:
    """Read and write with `threads` threads, each alternating between its pieces of both."""
    files = [file for name in inputs for file in sorted(Path(name).rglob("*.safetensors"))]
    total = sum(file.stat().st_size for file in files)
    output_bytes = output_bytes // ALIGNMENT * ALIGNMENT
    started = time.perf_counter()
    flags = os.O_DIRECT if direct else 0
    out = os.open(output, os.O_RDWR | os.O_CREAT | os.O_TRUNC | flags, 0o644)
    os.posix_fallocate(out, 0, output_bytes)
    pieces = iter(_pieces(files))
    lock = threading.Lock()
    position = [0]
    descriptors = {file: os.open(file, os.O_RDONLY | flags) for file in files}

    def take() -> tuple[int, int, int, int] | None:
        """The next piece as (place among all input bytes, descriptor, offset, length), its reading begun."""
        with lock:
            piece = next(pieces, None)
            if piece is None:
                return None
            file, offset, length = piece
            start = position[0]
            position[0] += length
        if not direct:
            os.posix_fadvise(descriptors[file], offset, length, os.POSIX_FADV_WILLNEED)
        return start, descriptors[file], offset, length

    def work() -> None:
        (buffer,) = allocate([_PIECE])
        following = [take() for _ in range(_AHEAD)]
        while piece := following.pop(0):
            following.append(take())
            start, descriptor, offset, length = piece
            done = 0
            while done < length:  # to the end of what is allocated: direct reads are of whole blocks
                done += os.preadv(descriptor, [buffer[done:]], offset + done)
            edges = (output_bytes * edge // total for edge in (start, start + length))
            first, last = (edge // ALIGNMENT * ALIGNMENT for edge in edges)
            written = first
            while written < last:
                written += os.pwrite(out, buffer[: last - written], written)
            if not direct:
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("threads", type=int)
    parser.add_argument("output_bytes", type=int)
    parser.add_argument("output")
    parser.add_argument("inputs", nargs="+")
    parser.add_argument("--direct", action="store_true")
    arguments = parser.parse_args()
    main(
        arguments.threads, arguments.output_bytes, arguments.output, arguments.inputs, direct=arguments.direct
    )
