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

_PIECE = 4 << 20


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

    def work() -> None:
        buffer = bytearray(_PIECE)
        descriptors: dict[Path, int] = {}
        while True:
            with lock:
                piece = next(pieces, None)
                if piece is None:
                    return
                start = position[0]
                position[0] += piece[2]
            file, offset, length = piece
            if file not in descriptors:
                descriptors[file] = os.open(file, os.O_RDONLY)
            view = memoryview(buffer)[:length]
            done = 0
            while done < length:
                done += os.preadv(descriptors[file], [view[done:]], offset + done)
            first, last = (output_bytes * edge // total for edge in (start, start + length))
            while first < last:
                first += os.pwrite(out, view[: last - first], first)

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
