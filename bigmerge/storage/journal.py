"""The record of finished steps: what may be trusted when an interrupted run goes on.

One line a step, written only after the step's data is on the disk: number, digest of the output piece, digests
of the input pieces, and a checksum of the line itself. A torn or damaged line ends the trusted part.
"""

from __future__ import annotations

import fcntl
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bigmerge.errors import OutputError
from bigmerge.storage.writing import output_errors, write_text


@dataclass(frozen=True, slots=True)
class Entry:
    """One finished step: 16 bytes of output digest, 8 bytes of digest for each input."""

    number: int
    output: bytes
    inputs: tuple[bytes, ...]


class Journal:
    """The journal in the file `path`, as a context manager; `replay` first, then `append`.

    One process at a time: the file is locked until the process ends, however it ends.

    Raises:
        OutputError: another process has it open, the disk is full or reports an error.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with output_errors(path):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise OutputError(
                f"{path}: another process is writing it",
                hint="wait until it has ended; it belongs to a run that was stopped or still goes on",
                file=str(path),
            ) from None
        except OSError:
            pass  # a file system without locks

    def replay(self) -> Iterator[Entry]:
        """The entries of earlier runs. What follows the last whole line is cut off when they are exhausted."""
        trusted = 0
        with self.path.open("rb") as file:
            for line in file:
                entry = _parse(line)
                if entry is None:
                    break
                trusted += len(line)
                yield entry
        os.ftruncate(self._descriptor, trusted)

    def append(self, entries: Iterable[Entry]) -> None:
        """Add entries and wait until they are on the disk."""
        lines = b"".join(_line(entry) for entry in entries)
        with output_errors(self.path):
            os.lseek(self._descriptor, 0, os.SEEK_END)
            while lines:
                lines = lines[os.write(self._descriptor, lines) :]
            os.fdatasync(self._descriptor)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._descriptor)


def rewrite_journal(path: Path, entries: Iterable[Entry]) -> None:
    """Replace the journal at once and durably; it holds `entries` alone.

    Raises:
        OutputError: the disk is full or refuses.
    """
    write_text(path, "".join(_line(entry).decode("ascii") for entry in entries))


def _line(entry: Entry) -> bytes:
    body = f"{entry.number} {entry.output.hex()} {','.join(digest.hex() for digest in entry.inputs)}".encode()
    return body + f" {zlib.crc32(body):08x}\n".encode()


def _parse(line: bytes) -> Entry | None:
    body, _, checksum = line.rpartition(b" ")
    if not line.endswith(b"\n") or checksum.strip() != f"{zlib.crc32(body):08x}".encode():
        return None
    try:
        number, output, inputs = body.decode("ascii").split(" ")
        return Entry(
            int(number), bytes.fromhex(output), tuple(bytes.fromhex(part) for part in inputs.split(","))
        )
    except ValueError:
        return None
