"""bigmerge.storage.reading and inputs: every way of reading gives the same bytes and the same errors."""

from __future__ import annotations

import errno
import logging
import mmap
import os
import random
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from bigmerge.errors import CheckpointError
from bigmerge.storage import inputs as module
from bigmerge.storage.inputs import InputFiles
from bigmerge.storage.reading import ALIGNMENT, IO, IO_KINDS, DirectFile, buffer_bytes

SIZE = 5 * ALIGNMENT + 1234


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(random.Random(0).randbytes(SIZE))
    return path


@pytest.fixture(params=IO_KINDS)
def io(request: pytest.FixtureRequest, path: Path) -> IO:
    if request.param == "direct":
        try:
            DirectFile(path).close()
        except OSError as error:
            pytest.skip(f"no direct reads here: {error}")
    kind: IO = request.param
    return kind


def buffer(nbytes: int, io: IO) -> memoryview:
    return memoryview(mmap.mmap(-1, max(1, buffer_bytes(nbytes, io))))


def read_and_release(files: InputFiles, path: Path, start: int, nbytes: int) -> None:
    files[path].read(start, nbytes, buffer(nbytes, files.io))
    files[path].release(start, nbytes)


def ranges() -> Iterator[tuple[int, int]]:
    yield from (
        (0, SIZE),
        (0, 0),
        (0, 1),
        (SIZE - 1, 1),
        (SIZE, 0),
        (ALIGNMENT - 1, 2),
        (ALIGNMENT, ALIGNMENT),
    )
    generator = random.Random(1)
    for _ in range(200):
        start = generator.randrange(SIZE)
        yield start, generator.randrange(SIZE - start + 1)


def test_every_range_is_read_as_it_is(path: Path, io: IO) -> None:
    content = path.read_bytes()
    with InputFiles([path, path], io) as files:
        assert files.io == io
        assert files[path].nbytes == SIZE
        for start, nbytes in ranges():
            files[path].read_ahead(start, nbytes)
            window = files[path].read(start, nbytes, buffer(nbytes, io))
            assert window == content[start : start + nbytes]
            files[path].release(start, nbytes)


def test_short_reads_are_gone_on_with(path: Path, io: IO, monkeypatch: pytest.MonkeyPatch) -> None:
    if io == "mmap":
        pytest.skip("a mapping is not read by calls")
    content = path.read_bytes()
    original = os.preadv
    least = ALIGNMENT if io == "direct" else 1
    calls = []

    def preadv(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        calls.append(offset)
        return original(descriptor, [buffers[0][: max(least, len(buffers[0]) // 2 // least * least)]], offset)

    with InputFiles([path], io) as files:
        monkeypatch.setattr(os, "preadv", preadv)
        assert files[path].read(7, SIZE - 7, buffer(SIZE, io)) == content[7:]
    assert len(calls) > 2


def test_a_file_that_is_truncated_meanwhile(path: Path, io: IO) -> None:
    content = path.read_bytes()
    with InputFiles([path], io) as files:
        os.truncate(path, 2 * ALIGNMENT + 100)
        for start, nbytes in ((ALIGNMENT, 2 * ALIGNMENT), (4 * ALIGNMENT, 10), (SIZE - 1, 1)):
            with pytest.raises(CheckpointError, match=r"ends before byte|cannot be read") as caught:
                read_and_release(files, path, start, nbytes)
            assert str(path) in caught.value.message
            assert caught.value.hint is not None
        assert files[path].read(0, ALIGNMENT, buffer(ALIGNMENT, io)) == content[:ALIGNMENT]


def test_an_error_of_the_disk_names_the_file(path: Path, io: IO, monkeypatch: pytest.MonkeyPatch) -> None:
    if io == "mmap":
        pytest.skip("see test_mapping")

    def preadv(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with InputFiles([path], io) as files:
        monkeypatch.setattr(os, "preadv", preadv)
        with pytest.raises(
            CheckpointError, match=r"bytes \d to 8 cannot be read \(Input/output error\)"
        ) as caught:
            files[path].read(3, 5, buffer(5, io))
    assert caught.value.data["file"] == str(path)


def test_more_files_than_a_process_may_open_at_first(tmp_path: Path, io: IO) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/proc/self/fd"))
    paths = [tmp_path / str(number) for number in range(60)]
    for path in paths:
        path.write_bytes(path.name.encode())
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 40, before[1]))
    try:
        with InputFiles(paths, io) as files:
            assert files[paths[-1]].read(0, 2, buffer(2, io)) == b"59"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_files_that_cannot_be_opened(path: Path, io: IO, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be opened") as caught:
        InputFiles([path, tmp_path / "nothing"], io)
    assert str(tmp_path / "nothing") in caught.value.message
    with pytest.raises(CheckpointError, match="is no regular file"):
        InputFiles([tmp_path], io)


@pytest.mark.parametrize("lacking", ["mmap", "direct"])
def test_what_a_file_system_lacks_is_replaced_by_pread(
    path: Path, lacking: IO, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = path.with_name("other")
    other.write_bytes(b"other")

    def refuse(path: Path) -> None:
        if path.name == "other":
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    kind = {"mmap": "MappedFile", "direct": "DirectFile"}[lacking]
    original = getattr(module, kind)
    monkeypatch.setattr(module, kind, lambda path: refuse(path) or original(path))
    try:
        with caplog.at_level(logging.WARNING, logger="bigmerge"), InputFiles([path, other], lacking) as files:
            assert files.io == "pread"
            assert files[path].read(1, 100, buffer(100, "pread")) == path.read_bytes()[1:101]
            assert files[other].read(0, 5, buffer(5, "pread")) == b"other"
            files[path].release(1, 100)
    except OSError as error:
        pytest.skip(f"no direct reads here: {error}")
    assert f"--io {lacking} does not work here" in caplog.text


def test_direct_reads_leave_the_page_cache_alone(tmp_path: Path) -> None:
    import ctypes

    path = tmp_path / "file"
    path.write_bytes(bytes(256 * ALIGNMENT))
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)

    def cached() -> int:
        with mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE) as mapping:
            vector = (ctypes.c_ubyte * 256)()
            address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
            ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapping)), vector)
            return sum(page & 1 for page in vector)

    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    if cached():
        pytest.skip("this file system keeps its files in memory")
    with InputFiles([path], "direct") as files:
        if files.io != "direct":
            pytest.skip("no direct reads here")
        files[path].read(0, 256 * ALIGNMENT, buffer(256 * ALIGNMENT, "direct"))
        assert cached() == 0
    with InputFiles([path], "pread") as files:
        files[path].read(0, 256 * ALIGNMENT, buffer(256 * ALIGNMENT, "pread"))
        assert cached() == 256
