"""bigmerge.checkpoints.header: against the safetensors library, and against files that mean harm."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from bigmerge.checkpoints.dtypes import BITS, FLOATS, INTEGERS, torch_dtype
from bigmerge.checkpoints.header import MAX_HEADER_BYTES, build_header, read_header
from bigmerge.errors import CheckpointError

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def packed(header: bytes | str | object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else header if isinstance(header, str) else json.dumps(header)
    raw = raw.encode() if isinstance(raw, str) else raw
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def stored(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    return path


# -- what is valid ------------------------------------------------------------------------------------------


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {
        f"kind.{name}": torch.arange(6).reshape(2, 3).to(torch_dtype(name)) for name in FLOATS | INTEGERS
    }
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "名前.β weight": torch.ones(5)}
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "note": 'quotes " and ünïcode'})
    header = read_header(path)
    assert header.metadata == {"format": "pt", "note": 'quotes " and ünïcode'}
    assert set(header.entries) == set(tensors)
    content = path.read_bytes()
    for name, tensor in tensors.items():
        entry = header.entries[name]
        assert torch_dtype(entry.dtype) == tensor.dtype
        assert entry.shape == tuple(tensor.shape)
        raw = content[entry.start : entry.start + entry.nbytes]
        assert raw == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors = {
        f"kind.{name}": torch.arange(6).reshape(2, 3).to(torch_dtype(name))
        for name in sorted(FLOATS | INTEGERS, key=lambda name: -BITS[name])
    }
    tensors |= {"zero-dimensional": torch.tensor(1, dtype=torch.uint8), "empty": torch.empty(3, 0)}
    tensors |= {"名前": torch.tensor([7], dtype=torch.uint8)}
    names = {torch_dtype(name): name for name in FLOATS | INTEGERS}
    header = build_header(
        {name: (names[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()},
        {"format": "pt", "ключ": "значение"},
    )
    assert len(header) % 4096 == 0
    data = b"".join(t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors.values())
    path = stored(tmp_path, header + data)
    loaded = load_file(path)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].view(torch.uint8), tensor.view(torch.uint8))
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "ключ": "значение"}
    assert read_header(path).metadata == {"format": "pt", "ключ": "значение"}


@pytest.mark.parametrize(
    ("header", "data", "names"),
    [
        ("{}", b"", []),
        ('{"__metadata__":null}', b"", []),
        ('{"__metadata__":{"a":"b"}}   ', b"", []),
        ('{"a":{"shape":[],"data_offsets":[0,4],"dtype":"F32"}} ', b"1234", ["a"]),  # 55 bytes, not padded
        ('{"b":{"dtype":"U8","shape":[1],"data_offsets":[1,2]},'
         '"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"12", ["a", "b"]),
        ('{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
         '"b":{"dtype":"U8","shape":[2,0],"data_offsets":[0,0]}}', b"", ["a", "b"]),
        ('{"\\ud83d\\ude00":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1", ["😀"]),
        ('{"a":{"dtype":"F8_E8M0","shape":[1],"data_offsets":[0,1]}}', b"1", ["a"]),
        ('{"a":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}}', b"12", ["a"]),
        ('{"a":{"dtype":"C64","shape":[1],"data_offsets":[0,8]}}', b"12345678", ["a"]),
    ],
)  # fmt: skip
def test_unusual_but_valid(tmp_path: Path, header: str, data: bytes, names: list[str]) -> None:
    content = packed(header, data)
    assert sorted(name for name, _ in safetensors.deserialize(content)) == names
    assert sorted(read_header(stored(tmp_path, content)).entries) == names


# -- what is hostile ----------------------------------------------------------------------------------------

HOSTILE = {
    "empty file": (b"", "0 bytes long, too short"),
    "short prefix": (b"\x02\0\0", "3 bytes long, too short"),
    "header longer than the file": (packed("{}", length=100), "claims a header of 100 bytes but is only 10"),
    "huge header": (packed("{}", length=2**64 - 1), "claims a header of 18446744073709551615 bytes"),
    "header above the limit": (packed("{}", length=MAX_HEADER_BYTES + 1), "the limit is 100000000"),
    "no JSON": (packed("{]"), "no valid JSON object"),
    "no object": (packed("[]"), "does not start with '{'"),
    "leading space": (packed(" {}"), "does not start with '{'"),
    "nothing": (packed(""), "does not start with '{'"),
    "two objects": (packed("{}{}"), "no valid JSON object"),
    "padded with zeros": (packed(b"{}\0\0"), "no valid JSON object"),
    "no UTF-8": (packed(b'{"\xff":1}'), "no valid JSON object"),
    "half a surrogate pair": (packed('{"\\ud800":' + json.dumps(ONE) + "}", bytes(8)), "surrogate"),
    "half a pair in the metadata": (packed('{"__metadata__":{"a":"\\udfff"}}'), "surrogate"),
    "nested bomb": (packed('{"a":' + "[" * 200_000 + "]" * 200_000 + "}"), "no valid JSON object"),
    "long number": (packed('{"a":' + "9" * 10_000 + "}"), "no valid JSON object"),
    "a tensor twice": (
        packed('{"w":' + json.dumps(ONE) + ',"w":' + json.dumps(ONE) + "}", bytes(8)),
        "'w' appears twice",
    ),
    "metadata twice": (packed('{"__metadata__":{},"__metadata__":{}}'), "'__metadata__' appears twice"),
    "a key of the metadata twice": (packed('{"__metadata__":{"k":"1","k":"2"}}'), "'k' appears twice"),
    "a key of an entry twice": (
        packed('{"w":{"dtype":"U8","shape":[1],"shape":[8],"data_offsets":[0,8]}}', bytes(8)),
        "'shape' appears twice",
    ),
    "metadata no map": (packed({"__metadata__": ["a"]}), "no map from strings to strings"),
    "metadata no strings": (packed({"__metadata__": {"a": 1}}), "no map from strings to strings"),
    "metadata false": (packed({"__metadata__": False}), "no map from strings to strings"),
    "entry no object": (packed({"w": 3}), "tensor 'w' is not described by"),
    "entry incomplete": (packed({"w": {"dtype": "F32", "shape": []}}), "tensor 'w' is not described by"),
    "entry with more": (packed({"w": ONE | {"strides": [1]}}, bytes(8)), "tensor 'w' is not described by"),
    "unknown dtype": (packed({"w": ONE | {"dtype": "F31"}}, bytes(8)), "unknown dtype 'F31'"),
    "dtype no string": (packed({"w": ONE | {"dtype": ["F32"]}}, bytes(8)), "unknown dtype ['F32']"),
    "negative size": (packed({"w": ONE | {"shape": [-2, -1]}}, bytes(8)), "no list of whole numbers"),
    "float size": (packed({"w": ONE | {"shape": [2.0]}}, bytes(8)), "no list of whole numbers"),
    "NaN size": (packed('{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}'), "whole numbers"),
    "bool size": (packed({"w": ONE | {"shape": [2, True]}}, bytes(8)), "no list of whole numbers"),
    "shape no list": (packed({"w": ONE | {"shape": "22"}}, bytes(8)), "no list of whole numbers"),
    "huge size": (packed({"w": ONE | {"shape": [2**64]}}, bytes(8)), "no list of whole numbers"),
    "huge product": (packed({"w": ONE | {"shape": [2**62] * 1000}}, bytes(8)), "larger than any file"),
    "product that wraps round": (packed({"w": ONE | {"shape": [2**32, 2**32]}}), "larger than any file"),
    "offsets reversed": (packed({"w": ONE | {"data_offsets": [8, 0]}}, bytes(8)), "no begin and end"),
    "one offset": (packed({"w": ONE | {"data_offsets": [8]}}, bytes(8)), "no begin and end"),
    "negative offset": (packed({"w": ONE | {"data_offsets": [-8, 0]}}, bytes(8)), "no begin and end"),
    "float offset": (packed({"w": ONE | {"data_offsets": [0, 8.0]}}, bytes(8)), "no begin and end"),
    "huge offset": (packed({"w": ONE | {"data_offsets": [0, 2**70]}}, bytes(8)), "no begin and end"),
    "too few bytes": (packed({"w": ONE | {"data_offsets": [0, 4]}}, bytes(4)), "4 bytes of data, but F32 [2] needs 8"),
    "too many bytes": (packed({"w": ONE | {"data_offsets": [0, 9]}}, bytes(9)), "9 bytes of data, but F32 [2] needs 8"),
    "out of the file": (packed({"w": ONE}, bytes(7)), "but its header describes"),
    "far out of the file": (
        packed({"w": {"dtype": "U8", "shape": [2**40], "data_offsets": [0, 2**40]}}),
        "but its header describes",
    ),
    "trailing bytes": (packed({"w": ONE}, bytes(9)), "but its header describes"),
    "trailing bytes alone": (packed({}, bytes(1)), "but its header describes"),
    "gap": (packed({"w": ONE | {"data_offsets": [4, 12]}}, bytes(12)), "tensor 'w' leaves a gap before it"),
    "overlap": (
        packed({"v": ONE, "w": ONE | {"data_offsets": [4, 12]}}, bytes(12)),
        "tensor 'w' overlaps another tensor",
    ),
    "the same bytes twice": (packed({"v": ONE, "w": ONE}, bytes(8)), "overlaps another tensor"),
    "empty tensor inside another": (
        packed({"v": ONE, "w": {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]}}, bytes(8)),
        "tensor 'w' overlaps another tensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(tmp_path: Path, case: str) -> None:
    content, expected = HOSTILE[case]
    path = stored(tmp_path, content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert str(path) in caught.value.message
    assert expected in caught.value.message
    assert caught.value.hint
    assert caught.value.data["file"] == str(path)
    assert len(caught.value.message) < len(str(path)) + 500, "a message that fits on a screen"


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "not there", tmp_path / ("x" * 300)):
        with pytest.raises(CheckpointError, match="cannot be read") as caught:
            read_header(path)
        assert str(path) in caught.value.message


def test_every_truncation_of_a_valid_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "whole.safetensors"
    save_file({"a": torch.arange(3.0), "b": torch.tensor(2)}, path, metadata={"format": "pt"})
    whole = path.read_bytes()
    read_header(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_header(path)


def test_many_names_of_which_the_last_is_double_do_not_take_long(tmp_path: Path) -> None:
    entry = json.dumps({"dtype": "U8", "shape": [0], "data_offsets": [0, 0]})
    names = [f'"{number}":{entry}' for number in range(50_000)]
    path = stored(tmp_path, packed("{" + ",".join([*names, names[-1]]) + "}"))
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="'49999' appears twice"):
        read_header(path)
    assert time.monotonic() - started < 10  # quadratic: minutes
