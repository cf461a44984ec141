"""Writes a Fisher: shards with the checkpoint's tensor names, and in their headers what is needed to trust them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bigmerge.checkpoints.checkpoint import open_checkpoint
from bigmerge.checkpoints.dtypes import dtype_name
from bigmerge.checkpoints.fisher_facts import FACTS_KEY, SUMS_KEY
from bigmerge.checkpoints.layout import Layout, lay_out
from bigmerge.errors import EstimationError
from bigmerge.fisher.names import CheckpointNames
from bigmerge.fisher.state import tensor_bytes
from bigmerge.storage.digests import digest_stored_tensor
from bigmerge.storage.manifest import write_manifest
from bigmerge.storage.writing import CheckpointWriter, write_json

#: the same facts as in the headers, for people
INFO_FILE = "fisher_info.json"
_BLOCK = 1 << 22  # elements


@dataclass(frozen=True)
class TensorSums:
    """Sums over the stored values of one tensor, in float64.

    Attributes:
        total: ΣF.
        squares: ΣF².
        zeros: how many values are exactly zero.
    """

    total: float
    squares: float
    zeros: int


def mean_values(
    sums: dict[str, torch.Tensor], examples: int, names: CheckpointNames, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """F = Σ/N in the storage dtype, by checkpoint name. `sums` is used up, to save memory.

    Raises:
        EstimationError: a value is not finite.
    """
    values: dict[str, torch.Tensor] = {}
    for name in list(sums):
        value = sums.pop(name).div_(examples)
        if not bool(torch.isfinite(value).all()):
            raise EstimationError(
                f"the Fisher of {name} is not finite: its sum of squares leaves the range of float32",
                parameter=name,
            )
        values[name] = value.to(dtype)
    return names.convert(values)


def measure(value: torch.Tensor) -> TensorSums:
    """Sums over a tensor, in blocks of fixed size by one thread: the same bits on any machine."""
    totals, squares, zeros = [], [], 0
    for start, stop in _blocks(value.numel()):
        block = value.reshape(-1)[start:stop].cpu().double().numpy()
        totals.append(float(np.sum(block)))
        squares.append(float(np.sum(block * block)))
        zeros += int(block.size - np.count_nonzero(block))
    return TensorSums(math.fsum(totals), math.fsum(squares), zeros)


def write_fisher(
    directory: Path, values: Mapping[str, torch.Tensor], facts: Mapping[str, Any], shard_bytes: int
) -> dict[str, Any]:
    """Write `values` (checkpoint name → mean) into `directory`, which is emptied first.

    Args:
        facts: what is recorded, except what follows from the values.

    Returns:
        All that is recorded under "bigmerge.fisher".

    Raises:
        OutputError: the disk is full or refuses.
    """
    for leftover in directory.iterdir():
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    sums = {name: measure(value) for name, value in values.items()}
    recorded = {
        **facts,
        "sum": math.fsum(item.total for item in sums.values()),
        "sum_squares": math.fsum(item.squares for item in sums.values()),
        "elements": sum(value.numel() for value in values.values()),
        "zeros": sum(item.zeros for item in sums.values()),
    }

    def metadata(names: Sequence[str]) -> dict[str, str]:
        moments = {name: [sums[name].total, sums[name].squares] for name in names}
        return {"format": "pt", FACTS_KEY: json.dumps(recorded), SUMS_KEY: json.dumps(moments)}

    content = {name: (dtype_name(value.dtype), tuple(value.shape)) for name, value in values.items()}
    layout: Layout = lay_out(content, shard_bytes, metadata=metadata)
    with CheckpointWriter(directory, layout) as writer:
        writer.create()
        for name, value in values.items():
            flat = value.reshape(-1)
            for start, stop in _blocks(value.numel()):
                writer.write(name, start * value.element_size(), tensor_bytes(flat[start:stop]))
        writer.sync()
    write_json(directory / INFO_FILE, recorded)
    stored = open_checkpoint(directory).tensors.values()
    write_manifest(
        directory,
        tensors={
            spec.name: {"digest": digest_stored_tensor(spec.path, spec.start, spec.dtype, spec.numel)}
            for spec in stored
        },
        companions=[INFO_FILE],
        facts={"kind": "fisher"},
    )
    return recorded


def _blocks(numel: int) -> Iterator[tuple[int, int]]:
    for start in range(0, numel, _BLOCK):
        yield start, min(start + _BLOCK, numel)
