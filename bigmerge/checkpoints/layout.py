"""Where every tensor of a checkpoint that does not exist yet will lie: offsets first, data later."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bigmerge.checkpoints.checkpoint import natural_key
from bigmerge.checkpoints.dtypes import BITS, byte_count
from bigmerge.checkpoints.header import build_header

Metadata = Mapping[str, str] | Callable[[Sequence[str]], Mapping[str, str]]


@dataclass(frozen=True)
class Shard:
    """One file: its header's bytes, and the byte in the file where each tensor starts."""

    filename: str
    header: bytes
    starts: dict[str, int]
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """Files of a checkpoint. Depends on names, dtypes, shapes and the shard size alone.

    Attributes:
        tensors: name → (dtype, shape), in the order in which they lie in the files.
        shard_of: name → position in `shards`.
    """

    tensors: dict[str, tuple[str, tuple[int, ...]]]
    shards: tuple[Shard, ...]
    shard_of: dict[str, int]

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return sum(shard.nbytes for shard in self.shards)

    def place(self, name: str, offset: int = 0) -> tuple[int, int]:
        """(position in `shards`, byte in that file) of byte `offset` of a tensor."""
        number = self.shard_of[name]
        return number, self.shards[number].starts[name] + offset

    def index(self) -> dict[str, Any] | None:
        """The content of the index file; None for a single file, which needs none."""
        if len(self.shards) == 1:
            return None
        sizes = sum(byte_count(dtype, math.prod(shape)) for dtype, shape in self.tensors.values())
        return {
            "metadata": {"total_size": sizes},
            "weight_map": {
                name: self.shards[self.shard_of[name]].filename
                for name in sorted(self.tensors, key=natural_key)
            },
        }


def lay_out(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], shard_bytes: int, *, metadata: Metadata
) -> Layout:
    """Spread `tensors` (name → safetensors dtype, shape) over files of at most `shard_bytes` of data.

    Tensors are taken in natural order of their names, so that neither order nor sharding of the inputs shows;
    a tensor larger than a shard gets a file of its own. Within a file wider dtypes come first, which
    keeps every tensor aligned.

    Args:
        metadata: the `__metadata__` of every file, or a function from the names in a file to it.
    """
    groups: list[list[str]] = [[]]
    filled = 0
    for name in sorted(tensors, key=natural_key):
        dtype, shape = tensors[name]
        nbytes = byte_count(dtype, math.prod(shape))
        if groups[-1] and filled + nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += nbytes
    shards: list[Shard] = []
    ordered: dict[str, tuple[str, tuple[int, ...]]] = {}
    shard_of: dict[str, int] = {}
    for number, names in enumerate(groups):
        names.sort(key=lambda name: -BITS[tensors[name][0]])  # stable: natural order within a width
        content = {name: tensors[name] for name in names}
        header = build_header(content, metadata(names) if callable(metadata) else metadata)
        position = len(header)
        starts: dict[str, int] = {}
        for name, (dtype, shape) in content.items():
            starts[name] = position
            shard_of[name] = number
            position += byte_count(dtype, math.prod(shape))
        filename = (
            "model.safetensors"
            if len(groups) == 1
            else f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        )
        shards.append(Shard(filename, header, starts, position))
        ordered.update(content)
    return Layout(ordered, tuple(shards), shard_of)
