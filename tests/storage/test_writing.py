"""bigmerge.storage.writing: planned files, filled in any order."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bigmerge.checkpoints.dtypes import byte_count, dtype_name
from bigmerge.checkpoints.layout import lay_out
from bigmerge.errors import OutputError
from bigmerge.storage.buffers import ALIGNMENT, allocate
from bigmerge.storage.writing import CheckpointWriter, write_json, write_text
from tests.conftest import normal, read_checkpoint

TENSORS = {f"h.{n}.w": normal((50, n + 1), n) for n in range(6)} | {
    "ids": torch.arange(9),
    "half": normal(33, 7, torch.bfloat16),
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(2.0),
}
SPECS = {name: (dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def raw(name: str) -> bytes:
    return bytes(TENSORS[name].reshape(-1).view(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize("shard_bytes", [300, 10**6])
def test_pieces_in_any_order_from_several_threads(tmp_path: Path, shard_bytes: int) -> None:
    layout = lay_out(SPECS, shard_bytes, metadata={"format": "pt"})
    pieces = [
        (name, start, raw(name)[start : start + 32])
        for name in TENSORS
        for start in range(0, len(raw(name)), 32)
    ]
    random.Random(0).shuffle(pieces)
    with CheckpointWriter(tmp_path, layout) as writer:
        writer.create()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda piece: writer.write(*piece), pieces))
        writer.sync(["h.1.w"])
        writer.sync()
        for name in TENSORS:
            assert writer.read(name, 0, len(raw(name))) == raw(name)
        assert writer.read("h.3.w", 4, 8) == raw("h.3.w")[4:12]
    loaded = read_checkpoint(tmp_path)
    assert set(loaded) == set(TENSORS)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_headers_and_space_come_first(tmp_path: Path) -> None:
    layout = lay_out(SPECS, 300, metadata={"format": "pt"})
    with CheckpointWriter(tmp_path, layout) as writer:
        writer.create()
        for shard in layout.shards:
            path = tmp_path / shard.filename
            assert path.stat().st_size == shard.nbytes
            assert path.stat().st_blocks * 512 >= shard.nbytes, "the space is there, not only promised"
            assert all(not tensor.any() for tensor in load_file(path).values())
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index == layout.index()


def test_creating_again_keeps_data_and_mends_sizes_and_headers(tmp_path: Path) -> None:
    layout = lay_out(SPECS, 10**6, metadata={"format": "pt"})
    with CheckpointWriter(tmp_path, layout) as writer:
        writer.create()
        writer.write("h.0.w", 0, raw("h.0.w"))
    path = tmp_path / "model.safetensors"
    with path.open("r+b") as file:
        file.write(b"damaged!")
        file.seek(0, os.SEEK_END)
        file.write(b"too long")
    with CheckpointWriter(tmp_path, layout) as writer:
        writer.create()
        assert writer.read("h.0.w", 0, 200) == raw("h.0.w")
    assert torch.equal(load_file(path)["h.0.w"], TENSORS["h.0.w"])


# -- past the page cache ------------------------------------------------------------------------------------

LARGE = {"wide": ("F64", (5000,)), "w": ("U8", (50_001,)), "odd": ("U8", (30_000,))}


def placed(data: bytes, position: int, *, off: int = 0) -> memoryview:
    """`data` in memory as it will lie in its file, or `off` bytes from there."""
    lead = (position + off) % ALIGNMENT
    (buffer,) = allocate([lead + len(data)])
    buffer[lead:] = data
    return buffer[lead:]


def note_direct_writes(monkeypatch: pytest.MonkeyPatch, most: int = 1 << 30) -> list[tuple[int, int]]:
    """(position, bytes) of every write past the cache; none writes more than `most` bytes."""
    original = os.pwrite
    noted: list[tuple[int, int]] = []

    def pwrite(descriptor: int, data: memoryview, position: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            data = data[:most]
            noted.append((position, len(data)))
        return original(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", pwrite)
    return noted


@pytest.fixture
def directly(tmp_path: Path) -> Iterator[CheckpointWriter]:
    """A writer that writes past the cache, two files already created."""
    with CheckpointWriter(tmp_path, lay_out(LARGE, 90_000, metadata={}), direct=True) as writer:
        writer.create()
        if not writer._direct:
            pytest.skip("no direct writes here")
        yield writer


@pytest.mark.parametrize("off", [0, 16])
@pytest.mark.parametrize("most", [1 << 30, ALIGNMENT, 3 * ALIGNMENT // 2])
def test_direct_writes_give_the_same_file(
    directly: CheckpointWriter, monkeypatch: pytest.MonkeyPatch, most: int, off: int
) -> None:
    noted = note_direct_writes(monkeypatch, most)
    generator = random.Random(most)
    content = {}
    for name, (dtype, shape) in LARGE.items():
        content[name] = generator.randbytes(byte_count(dtype, shape[0]))
        pieces = []
        while sum(map(len, pieces)) < len(content[name]):
            start = sum(map(len, pieces))
            pieces.append(content[name][start : start + generator.choice([1, 4095, 4096, 9000, 20_000])])
        starts = [sum(map(len, pieces[:number])) for number in range(len(pieces))]
        for start, piece in generator.sample(list(zip(starts, pieces, strict=True)), len(pieces)):
            _, position = directly.layout.place(name, start)
            directly.write(name, start, placed(piece, position, off=off))
    directly.sync()
    for name, data in content.items():
        assert directly.read(name, 0, len(data)) == data
    assert bool(noted) == (off == 0)
    assert all(position % ALIGNMENT == 0 for position, _ in noted)


def test_file_systems_that_open_but_refuse_direct_writes(
    directly: CheckpointWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.pwrite
    refused = []

    def pwrite(descriptor: int, data: memoryview, position: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(position)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return original(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", pwrite)
    data = random.Random(0).randbytes(40_000)
    for _ in range(2):
        directly.write("wide", 0, placed(data, directly.layout.place("wide")[1]))
    assert directly.read("wide", 0, len(data)) == data
    assert len(refused) == 1, "it is not tried again"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_errors_of_direct_writes(
    directly: CheckpointWriter, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def pwrite(*arguments: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OutputError, match=os.strerror(code)):
        directly.write("wide", 0, placed(bytes(40_000), directly.layout.place("wide")[1]))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_errors_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(code, os.strerror(code))

    layout = lay_out(SPECS, 10**6, metadata={})
    writer = CheckpointWriter(tmp_path, layout)
    writer.create()
    for call, act in (
        ("pwrite", lambda: writer.write("h.0.w", 0, raw("h.0.w"))),
        ("fdatasync", writer.sync),
        ("fsync", lambda: write_text(tmp_path / "model.safetensors", "x")),
        ("posix_fallocate", CheckpointWriter(tmp_path, layout).create),
    ):
        monkeypatch.setattr(os, call, refuse)
        with pytest.raises(OutputError, match=os.strerror(code)) as caught:
            act()
        monkeypatch.undo()
        assert str(tmp_path / "model.safetensors") in caught.value.message
        assert ("free space" in str(caught.value)) == (code == errno.ENOSPC)
        assert caught.value.data["errno"] == code
    writer.close()


def test_file_systems_that_cannot_reserve_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    layout = lay_out(SPECS, 10**6, metadata={})
    with CheckpointWriter(tmp_path, layout) as writer:
        writer.create()
    assert (tmp_path / "model.safetensors").stat().st_size == layout.nbytes


def test_text_is_replaced_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"λ": [0.1, None]})
    assert path.read_text(encoding="utf-8") == '{\n  "λ": [\n    0.1,\n    null\n  ]\n}\n'

    def refuse(descriptor: int) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OutputError):
        write_text(path, "half")
    assert json.loads(path.read_text(encoding="utf-8")) == {"λ": [0.1, None]}
    with pytest.raises(OutputError, match="cannot be written"):
        write_text(tmp_path / "no" / "file", "x")
