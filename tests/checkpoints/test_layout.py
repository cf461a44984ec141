"""bigmerge.checkpoints.layout: offsets that hold when the data comes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bigmerge.checkpoints.checkpoint import natural_key, open_checkpoint
from bigmerge.checkpoints.dtypes import BITS, FLOATS, INTEGERS, byte_count, dtype_name, itemsize, torch_dtype
from bigmerge.checkpoints.layout import Layout, lay_out
from tests.conftest import normal

METADATA = {"format": "pt"}
TENSORS = {
    "h.10.weight": normal((8, 3), 0),
    "h.2.weight": normal((8, 3), 1, torch.float64),
    "h.2.bias": normal(7, 2, torch.bfloat16),
    "h.2.mask": torch.tensor([True, False, True]),
    "ids": torch.arange(5),
    "scalar": torch.tensor(0.5, dtype=torch.float8_e5m2),
    "empty": torch.empty(4, 0),
    "large": normal(500, 3),
}
SPECS = {name: (dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def write(layout: Layout, directory: Path) -> None:
    directory.mkdir()
    for shard in layout.shards:
        content = bytearray(shard.nbytes)
        content[: len(shard.header)] = shard.header
        for name, start in shard.starts.items():
            data = TENSORS[name].reshape(-1).view(torch.uint8).numpy().tobytes()
            content[start : start + len(data)] = data
        (directory / shard.filename).write_bytes(content)
    index = layout.index()
    if index is not None:
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shard_bytes", [1, 100, 300, 2000, 10**9])
def test_files_load_with_safetensors(tmp_path: Path, shard_bytes: int) -> None:
    layout = lay_out(SPECS, shard_bytes, metadata=METADATA)
    write(layout, tmp_path / "out")
    loaded: dict[str, torch.Tensor] = {}
    for shard in layout.shards:
        part = load_file(tmp_path / "out" / shard.filename)
        assert set(part) == set(shard.starts)
        loaded |= part
        data = shard.nbytes - len(shard.header)
        assert data <= shard_bytes or sum(bool(TENSORS[name].numel()) for name in part) == 1
        for name, start in shard.starts.items():
            assert start % itemsize(SPECS[name][0]) == 0, "aligned"
    assert set(loaded) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(loaded[name].view(torch.uint8), tensor.view(torch.uint8))
    checkpoint = open_checkpoint(tmp_path / "out")  # which checks the index against the files
    assert list(checkpoint.tensors) == sorted(TENSORS, key=natural_key)
    assert layout.nbytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))


def test_index(tmp_path: Path) -> None:
    layout = lay_out(SPECS, 300, metadata=METADATA)
    index = layout.index()
    assert index is not None
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    assert list(index["weight_map"]) == sorted(TENSORS, key=natural_key)
    names = [shard.filename for shard in layout.shards]
    count = len(names)
    assert names == [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
    assert lay_out(SPECS, 10**9, metadata=METADATA).index() is None
    assert lay_out(SPECS, 10**9, metadata=METADATA).shards[0].filename == "model.safetensors"


def test_independent_of_the_order_of_input() -> None:
    known = lay_out(SPECS, 300, metadata=METADATA)
    chance = random.Random(0)
    for _ in range(10):
        items = list(SPECS.items())
        chance.shuffle(items)
        assert lay_out(dict(items), 300, metadata=METADATA) == known
        assert list(lay_out(dict(items), 300, metadata=METADATA).tensors) == list(known.tensors)


def test_layers_stay_together_in_natural_order() -> None:
    layout = lay_out({f"h.{n}.w": ("F32", (10,)) for n in range(12)}, 160, metadata=METADATA)
    assert [list(shard.starts) for shard in layout.shards] == [
        [f"h.{n}.w" for n in range(first, first + 4)] for first in (0, 4, 8)
    ]


def test_metadata_by_file(tmp_path: Path) -> None:
    layout = lay_out(SPECS, 300, metadata=lambda names: {"names": ",".join(sorted(names))})
    write(layout, tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    for path, metadata in checkpoint.file_metadata.items():
        shard = next(shard for shard in layout.shards if shard.filename == path.name)
        assert metadata["names"] == ",".join(sorted(shard.starts))


def test_nothing(tmp_path: Path) -> None:
    layout = lay_out({}, 100, metadata={})
    (shard,) = layout.shards
    (tmp_path / "x.safetensors").write_bytes(shard.header)
    assert load_file(tmp_path / "x.safetensors") == {}


def test_dtypes() -> None:
    for name in FLOATS | INTEGERS:
        assert dtype_name(torch_dtype(name)) == name
        assert dtype_name(str(torch_dtype(name))) == name
        assert torch_dtype(name).itemsize == itemsize(name)
        assert torch_dtype(name).is_floating_point == (name in FLOATS)
        assert byte_count(name, 7) == 7 * itemsize(name)
    assert dtype_name("bfloat16") == dtype_name("BF16") == "BF16"
    assert byte_count("F4", 3) == 2
    assert byte_count("F6_E2M3", 4) == 3
    assert byte_count("F32", 2**40) == 2**42
    assert FLOATS.isdisjoint(INTEGERS)
    assert set(BITS) >= FLOATS | INTEGERS
    for unknown in ("complex64", "float31", ""):
        with pytest.raises(KeyError):
            dtype_name(unknown)
