"""bigmerge.storage.writing: planned files, filled in any order."""

from __future__ import annotations

import errno
import json
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bigmerge.checkpoints.dtypes import dtype_name
from bigmerge.checkpoints.layout import lay_out
from bigmerge.errors import OutputError
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
