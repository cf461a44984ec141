"""bigmerge.storage.journal: whatever happens to the file, only what was written is trusted."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from bigmerge.errors import OutputError
from bigmerge.storage.journal import Entry, Journal

ENTRIES = [Entry(n * 7, bytes([n]) * 16, (bytes([n, 1]) * 4, bytes([n, 2]) * 4)) for n in range(4)]


def written(path: Path) -> bytes:
    with Journal(path) as journal:
        assert list(journal.replay()) == []
        journal.append(ENTRIES[:1])
        journal.append(ENTRIES[1:3])
        journal.append([])
        journal.append(ENTRIES[3:])
    return path.read_bytes()


def replayed(path: Path) -> list[Entry]:
    with Journal(path) as journal:
        return list(journal.replay())


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    content = written(path)
    assert content.count(b"\n") == 4
    assert replayed(path) == ENTRIES
    assert path.read_bytes() == content


def test_torn_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    content = written(path)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        whole = content[:length].count(b"\n")
        assert replayed(path) == ENTRIES[:whole]
        assert path.read_bytes().count(b"\n") == whole, "the torn line is cut off"
        with Journal(path) as journal:
            list(journal.replay())
            journal.append(ENTRIES[whole:])
        assert path.read_bytes() == content


@pytest.mark.parametrize("change", [0x01, 0x20, 0x80])
def test_damaged_at_every_byte(tmp_path: Path, change: int) -> None:
    path = tmp_path / "journal"
    content = written(path)
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= change
        path.write_bytes(damaged)
        found = replayed(path)
        assert found == ENTRIES[: content[:position].count(b"\n")]


def test_lines_that_go_on(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    content = written(path)
    for tail in (b"\n", b"0\n", b" \n", b"\0" * 4096, b"1 2 3 4\n", content[5:]):
        path.write_bytes(content + tail)
        assert replayed(path) == ENTRIES
        assert path.read_bytes() == content


def test_a_full_disk_is_an_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal"

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Journal(path) as journal:
        journal.append(ENTRIES[:1])
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OutputError, match="No space left") as caught:
            journal.append(ENTRIES[1:])
    assert "goes on where it stopped" in str(caught.value)
    monkeypatch.undo()
    assert replayed(path) == ENTRIES[:1]
    with pytest.raises(OutputError, match="cannot be written"):
        Journal(tmp_path)
