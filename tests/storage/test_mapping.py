"""bigmerge.storage.mapping: windows come, go, and never kill the process."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bigmerge.errors import CheckpointError
from bigmerge.storage.mapping import MappedFile, Mappings

PAGE = mmap.PAGESIZE


def resident(buffer: mmap.mmap) -> int:
    """Bytes of the mapping that count as this process's memory."""
    inside = found = 0
    address = MappedAddress.of(buffer)
    for line in Path("/proc/self/smaps").read_text(errors="replace").splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            start, end = (int(part, 16) for part in head.split("-"))
            inside = start <= address < end
        elif inside and head == "Rss:":
            found += int(line.split()[1]) * 1024
    return found


class MappedAddress:
    @staticmethod
    def of(buffer: mmap.mmap) -> int:
        import numpy as np

        return int(np.frombuffer(buffer, dtype=np.uint8).ctypes.data)


def test_populate_and_release(tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = os.urandom(64 * PAGE + 123)
    path.write_bytes(content)
    file = MappedFile(path)
    assert isinstance(file.buffer, mmap.mmap)
    assert file.nbytes == len(content)
    for start, nbytes in ((0, 1), (5, PAGE), (10 * PAGE + 7, 3 * PAGE), (64 * PAGE, 123), (0, len(content))):
        file.read_ahead(start, nbytes)
        file.populate(start, nbytes)
        assert file.buffer[start : start + nbytes] == content[start : start + nbytes]
        file.release(start, nbytes)
        assert file.buffer[start : start + nbytes] == content[start : start + nbytes], "it can come back"
    file.populate(0, len(content))
    assert resident(file.buffer) >= 64 * PAGE
    file.release(0, len(content))
    assert resident(file.buffer) == 0


def test_nothing_to_do(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    file = MappedFile(path)
    assert file.buffer == b""
    for act in (file.populate, file.read_ahead, file.release):
        act(0, 0)
    with pytest.raises(CheckpointError, match="ends before byte 1"):
        file.populate(0, 1)


def test_beyond_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(10))
    with pytest.raises(CheckpointError, match="ends before byte 11") as caught:
        MappedFile(path).populate(8, 3)
    assert str(path) in caught.value.message


def test_a_file_that_was_truncated_is_an_error_and_not_a_signal(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100 * PAGE))
    program = f"""
import os, sys
from pathlib import Path
from bigmerge.errors import CheckpointError
from bigmerge.storage.mapping import MappedFile
file = MappedFile(Path({str(path)!r}))
file.populate(0, {10 * PAGE})
os.truncate({str(path)!r}, {20 * PAGE})
file.populate(0, {20 * PAGE})
try:
    file.populate({50 * PAGE}, 100)
except CheckpointError as error:
    print(error)
    sys.exit(42)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        pytest.skip("this kernel has no MADV_POPULATE_READ")
    assert done.returncode == 42, done.stderr
    assert str(path) in done.stdout
    assert "truncated or changed during the run" in done.stdout


def test_kernels_without_populate_fall_back_to_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * PAGE)
    file = MappedFile(path)
    asked = []

    def advise(start: int, nbytes: int, advice: int) -> int:
        asked.append(advice)
        return errno.EINVAL if advice == 22 else 0

    monkeypatch.setattr(file, "_advise", advise)
    file.populate(0, 10)
    file.populate(0, 10)
    assert asked == [22, mmap.MADV_WILLNEED, mmap.MADV_WILLNEED], "it is tried once"


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be opened") as caught:
        MappedFile(tmp_path / "nothing")
    assert str(tmp_path / "nothing") in caught.value.message
    with pytest.raises(CheckpointError, match="cannot be memory-mapped"):
        MappedFile(tmp_path)


def test_mappings_map_each_file_once(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    mappings = Mappings([path, path])
    assert mappings[path] is mappings[path]
    with pytest.raises(CheckpointError):
        Mappings([path, tmp_path / "nothing"])
