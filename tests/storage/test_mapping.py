"""bigmerge.storage.mapping: windows come, go, and never kill the process."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bigmerge.errors import CheckpointError
from bigmerge.storage.mapping import MappedFile

PAGE = mmap.PAGESIZE


def resident(window: memoryview) -> int:
    """Bytes of the mapping that count as this process's memory."""
    inside = found = 0
    address = int(np.frombuffer(window, dtype=np.uint8).ctypes.data)
    for line in Path("/proc/self/smaps").read_text(errors="replace").splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            start, end = (int(part, 16) for part in head.split("-"))
            inside = start <= address < end
        elif inside and head == "Rss:":
            found += int(line.split()[1]) * 1024
    return found


def test_windows_come_and_go(tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = os.urandom(64 * PAGE + 123)
    path.write_bytes(content)
    file = MappedFile(path)
    assert file.nbytes == len(content)
    for start, nbytes in ((0, 1), (5, PAGE), (10 * PAGE + 7, 3 * PAGE), (64 * PAGE, 123), (0, len(content))):
        file.read_ahead(start, nbytes)
        window = file.read(start, nbytes)
        assert window == content[start : start + nbytes]
        assert window.readonly
        file.release(start, nbytes)
        assert window == content[start : start + nbytes], "it can come back"
    window = file.read(0, len(content))
    assert resident(window) >= 64 * PAGE
    file.release(0, len(content))
    assert resident(window) == 0
    del window
    file.close()


def test_nothing_to_do(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    file = MappedFile(path)
    assert file.read(0, 0) == b""
    file.read_ahead(0, 0)
    file.release(0, 0)
    with pytest.raises(CheckpointError, match="ends before byte 1"):
        file.read(0, 1)
    file.close()


def test_beyond_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(10))
    with pytest.raises(CheckpointError, match="ends before byte 11") as caught:
        MappedFile(path).read(8, 3)
    assert str(path) in caught.value.message


def test_closing_under_a_window_that_is_still_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * PAGE)
    file = MappedFile(path)
    window = file.read(0, PAGE)
    file.close()
    assert window == b"x" * PAGE


def test_a_file_that_was_truncated_is_an_error_and_not_a_signal(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100 * PAGE))
    program = f"""
import os, sys
from pathlib import Path
from bigmerge.errors import CheckpointError
from bigmerge.storage.mapping import MappedFile
file = MappedFile(Path({str(path)!r}))
file.read(0, {10 * PAGE})
os.truncate({str(path)!r}, {20 * PAGE})
file.read(0, {20 * PAGE})
try:
    file.read({50 * PAGE}, 100)
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
    file.read(0, 10)
    file.read(0, 10)
    assert asked == [22, mmap.MADV_WILLNEED, mmap.MADV_WILLNEED], "it is tried once"
