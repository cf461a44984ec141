"""A hundred thousand hostile headers, indexes and checkpoints: see `targets` for what must hold of each."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigmerge.checkpoints.dtypes import BITS
from bigmerge.errors import CheckpointError
from tests.fuzzing import guard, targets

# -- what is tried ------------------------------------------------------------------------------------------

_numbers = st.one_of(
    st.integers(0, 16),
    st.integers(-2, 2**66),
    st.floats(),
    st.booleans(),
    st.none(),
    st.text(max_size=3),
)
_lists = st.one_of(st.lists(_numbers, max_size=4), st.lists(st.integers(0, 8), max_size=3), _numbers)
_entries = st.one_of(
    st.fixed_dictionaries(
        {
            "dtype": st.one_of(st.sampled_from(sorted(BITS)), st.text(max_size=4), _numbers),
            "shape": _lists,
            "data_offsets": st.one_of(st.lists(st.integers(0, 40), min_size=2, max_size=2).map(sorted), _lists),
        },
        optional={"extra": _numbers},
    ),
    _lists,
)  # fmt: skip
_names = st.one_of(st.sampled_from(["a", "b", "__metadata__", "../a", "/a", "a" * 300]), st.text(max_size=4))
_headers = st.dictionaries(_names, _entries, max_size=4)
_json = st.recursive(
    st.one_of(_numbers, st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(_names, inner, max_size=4)),
    max_leaves=8,
)


@st.composite
def _weights(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    """Header and data that mostly go together: one thing or nothing is wrong."""
    header: dict[str, Any] = {}
    position = 0
    for name in draw(st.lists(_names.filter(lambda name: name != "__metadata__"), max_size=4, unique=True)):
        dtype = draw(st.sampled_from(sorted(BITS)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        numel = 1
        for size in shape:
            numel *= size
        nbytes = BITS[dtype] * numel // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + nbytes]}
        position += nbytes
    if draw(st.booleans()):
        keys = st.sampled_from(["format", "bigmerge.fisher", "bigmerge.sums", "x"])
        values = st.one_of(st.text(max_size=8), _json.map(json.dumps))
        header["__metadata__"] = draw(st.dictionaries(keys, values, max_size=3))
    if header and draw(st.integers(0, 4)) == 0:
        header[draw(st.sampled_from(sorted(header)))] = draw(_entries)
    return header, draw(st.binary(min_size=position, max_size=position))


def packed(header: object, data: bytes, longer: int = 0) -> bytes:
    """A safetensors file, its header's length off by `longer`."""
    raw = json.dumps(header).encode()
    return struct.pack("<Q", max(0, len(raw) + longer)) + raw + data


_safetensors = st.one_of(
    _weights().map(lambda whole: packed(*whole)),
    st.builds(packed, _headers, st.binary(max_size=48), st.integers(-8, 8)),
)


@st.composite
def _damaged(draw: st.DrawFn) -> bytes:
    """A file of which a bit is turned or an end is missing."""
    raw = bytearray(draw(_safetensors))
    where = draw(st.integers(0, 8 * len(raw) - 1))
    if draw(st.booleans()):
        raw[where // 8] ^= 1 << where % 8
    else:
        del raw[where // 8 :]
    return bytes(raw)


_random = st.one_of(
    st.binary(max_size=200),
    st.builds(
        lambda length, content: struct.pack("<Q", length) + b"{" + content,
        st.integers(0, 250),
        st.binary(max_size=200),
    ),
)
_shards = [f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)]


@st.composite
def _directory(draw: st.DrawFn) -> dict[str, bytes]:
    """Two shards, an index that says anything of them, and a configuration."""
    files = {}
    weight_map: dict[str, Any] = {}
    for name in _shards:
        header, data = draw(_weights())
        files[name] = packed(header, data)
        weight_map |= {tensor: name for tensor in header if tensor != "__metadata__"}
    named = st.sampled_from(
        [
            *_shards,
            f"../{targets.OUTSIDE}",
            "/etc/hostname",
            "..",
            "",
            "config.json",
            "a\0b",
            "x" * 300,
            "\ud800",
        ]
    )
    for tensor in draw(st.lists(st.one_of(_names, st.sampled_from([*weight_map, "a"])), max_size=2)):
        weight_map[tensor] = draw(st.one_of(named, _json))
    index: Any = {"metadata": {}, "weight_map": weight_map}
    if draw(st.integers(0, 7)) == 0:
        index = draw(_json)
    elif draw(st.integers(0, 7)) == 0:
        index["weight_map"] = draw(_json)
    text = json.dumps(index).encode()
    files["model.safetensors.index.json"] = text[: draw(st.integers(0, len(text)))] if draw(
        st.integers(0, 7)
    ) == 0 else text  # fmt: skip
    if draw(st.booleans()):
        keys = st.sampled_from(
            ["architectures", "model_type", "tie_word_embeddings", "id2label", "torch_dtype"]
        )
        files["config.json"] = json.dumps(
            draw(st.one_of(st.dictionaries(keys, _json, max_size=3), _json))
        ).encode()
    return files


# -- trying it ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fuzzing")
    targets.prepare(root)
    return root


def attempt(
    root: Path, target: Callable[[Path, Any], bool], strategy: st.SearchStrategy[Any], count: int
) -> int:
    """Try `count` inputs, always the same; returns how many were accepted."""
    tried = accepted = 0

    @settings(max_examples=count, deadline=None, database=None, derandomize=True)
    @given(strategy)
    def one(value: Any) -> None:
        nonlocal tried, accepted
        tried += 1
        accepted += target(root, value)

    one()
    assert tried >= count
    return accepted


ATTEMPTS = [
    (targets.check_header, _safetensors, 300, 30_000),
    (targets.check_header, _damaged(), 300, 30_000),
    (targets.check_header, _random, 200, 15_000),
    (targets.check_index, _directory(), 200, 25_000),
    (targets.check_merge, _directory(), 40, 2_000),
]
NAMES = ["headers", "damaged headers", "random bytes", "indexes", "merges"]


@pytest.mark.parametrize(("target", "strategy", "few", "many"), ATTEMPTS, ids=NAMES)
def test_a_few_hostile_files(root, target, strategy, few, many):
    attempt(root, target, strategy, few)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "strategy", "few", "many"), ATTEMPTS, ids=NAMES)
def test_a_hundred_thousand_hostile_files(root, target, strategy, few, many):
    assert sum(row[3] for row in ATTEMPTS) >= 100_000
    accepted = attempt(root, target, strategy, many)
    if strategy is not _random:  # else only the first check of all was tested
        assert many / 100 < accepted < many


# -- what would be found ------------------------------------------------------------------------------------


def test_the_guard_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.write_bytes(b"secret")
    with pytest.raises(guard.Escape, match=r"open .*outside"), guard.guarded(inside):
        (inside / ".." / "outside").read_bytes()
    (inside / "link").symlink_to(outside)
    with pytest.raises(guard.Escape, match=r"open .*outside"), guard.guarded(inside):
        (inside / "link").read_bytes()
    with pytest.raises(guard.Escape, match=r"os\.remove .*outside"), guard.guarded(inside):
        outside.unlink()
    with pytest.raises(MemoryError), guard.guarded(inside):
        bytearray(1 << 40)
    monkeypatch.setattr(guard, "_SECONDS", 0.05)
    with pytest.raises(guard.Hang), guard.guarded(inside):
        time.sleep(5)
    with pytest.raises(KeyError), guard.guarded(inside):
        raise KeyError("no error of bigmerge's own")
    with guard.guarded(inside):
        raise CheckpointError("what is hoped for")
