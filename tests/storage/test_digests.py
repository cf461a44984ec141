"""bigmerge.storage.digests: one digest, whether from pieces or from the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import xxhash

from bigmerge.checkpoints.dtypes import byte_count
from bigmerge.errors import CheckpointError
from bigmerge.storage import digests
from bigmerge.storage.digests import PIECE, combine_pieces, digest_file, digest_stored_tensor, piece_count


@pytest.mark.parametrize("numel", [0, 1, 99, 100, 101, 250, 1000])
@pytest.mark.parametrize("dtype", ["U8", "F32", "F4"])
def test_pieces_make_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numel: int, dtype: str
) -> None:
    monkeypatch.setattr(digests, "PIECE", 100)
    monkeypatch.setattr(digests, "_READ", 64)
    data = bytes(number * 31 % 251 for number in range(byte_count(dtype, numel)))
    path = tmp_path / "file"
    path.write_bytes(b"HEADER" + data + b"next")
    width = byte_count(dtype, 100)
    pieces = [xxhash.xxh3_128(data[start : start + width]).digest() for start in range(0, len(data), width)]
    assert len(pieces) == piece_count(numel)
    expected = xxhash.xxh3_128(b"".join(pieces)).hexdigest()
    assert digest_stored_tensor(path, 6, dtype, numel) == combine_pieces(pieces) == expected


def test_piece_count() -> None:
    assert [piece_count(n) for n in (0, 1, PIECE - 1, PIECE, PIECE + 1)] == [0, 1, 1, 1, 2]


def test_a_change_of_any_byte_shows(tmp_path: Path) -> None:
    data = bytearray(range(40))
    path = tmp_path / "file"
    path.write_bytes(data)
    known = digest_stored_tensor(path, 0, "F32", 10)
    for position in range(40):
        data[position] ^= 4
        path.write_bytes(data)
        assert digest_stored_tensor(path, 0, "F32", 10) != known
        data[position] ^= 4


def test_order_and_division_of_pieces_show() -> None:
    one, two = xxhash.xxh3_128(b"a").digest(), xxhash.xxh3_128(b"b").digest()
    assert combine_pieces([one, two]) != combine_pieces([two, one])
    assert combine_pieces([]) != combine_pieces([one])


def test_a_short_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(39))
    with pytest.raises(CheckpointError, match="ends before byte 40"):
        digest_stored_tensor(path, 0, "F32", 10)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"hello")
    assert digest_file(path) == xxhash.xxh3_128(b"hello").hexdigest()
