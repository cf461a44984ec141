"""Digests over all bytes of a tensor, in pieces that can be computed in any order.

A tensor is cut into pieces of 2^20 elements. Its digest is XXH3-128 over the concatenated XXH3-128 digests of
its pieces, so that it can be assembled from pieces written by several threads or runs. XXH3 finds accidental
damage at memory speed; it is no protection against someone who wants to deceive.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import xxhash

from bigmerge.checkpoints.dtypes import byte_count
from bigmerge.errors import CheckpointError

#: elements of one piece
PIECE = 1 << 20
ALGORITHM = "xxh3-128 over pieces of 1048576 elements"
_READ = 1 << 22


def piece_count(numel: int) -> int:
    """How many pieces a tensor of `numel` elements has (an empty tensor has none)."""
    return -(-numel // PIECE)


def combine_pieces(digests: Iterable[bytes]) -> str:
    """The digest of a tensor from its pieces' digests, in order; 32 hexadecimal digits."""
    whole = xxhash.xxh3_128()
    for digest in digests:
        whole.update(digest)
    return str(whole.hexdigest())


def digest_stored_tensor(path: Path, start: int, dtype: str, numel: int) -> str:
    """The digest of a tensor as it is stored from byte `start` of the file `path`.

    Raises:
        CheckpointError: the file ends before the tensor does.
    """
    with path.open("rb") as file:
        file.seek(start)
        return combine_pieces(_stored_pieces(file.fileno(), path, start, dtype, numel))


def _stored_pieces(descriptor: int, path: Path, start: int, dtype: str, numel: int) -> Iterator[bytes]:
    for first in range(0, numel, PIECE):
        digest = xxhash.xxh3_128()
        position = start + byte_count(dtype, first)
        end = start + byte_count(dtype, min(first + PIECE, numel))
        while position < end:
            data = os.pread(descriptor, min(_READ, end - position), position)
            if not data:
                raise CheckpointError(f"{path}: ends before byte {end}", file=str(path))
            digest.update(data)
            position += len(data)
        yield digest.digest()


def digest_file(path: Path) -> str:
    """XXH3-128 over a whole (small) file."""
    return str(xxhash.xxh3_128(path.read_bytes()).hexdigest())
