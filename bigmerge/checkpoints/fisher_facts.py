"""What a Fisher's header says of itself: the keys that `bigmerge fisher` writes and merging reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from bigmerge.checkpoints.checkpoint import Checkpoint
from bigmerge.errors import CheckpointError

FACTS_KEY = "bigmerge.fisher"
SUMS_KEY = "bigmerge.sums"


@dataclass(frozen=True)
class Moments:
    """Sums over the elements of a companion tensor, or of all merged tensors of one companion."""

    total: float
    squares: float
    elements: int

    @property
    def mean(self) -> float:
        return self.total / self.elements if self.elements else 0.0

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.total + other.total, self.squares + other.squares, self.elements + other.elements)


def is_fisher(checkpoint: Checkpoint) -> bool:
    """Whether the header says so."""
    return FACTS_KEY in checkpoint.metadata


def fisher_facts(fisher: Checkpoint) -> dict[str, Any]:
    """The facts recorded in the header; empty for a Fisher that another tool wrote.

    Raises:
        CheckpointError: they are there but no JSON object.
    """
    text = fisher.metadata.get(FACTS_KEY)
    return _object(text, fisher, FACTS_KEY) if text is not None else {}


def recorded_moments(fisher: Checkpoint) -> dict[str, Moments]:
    """ΣF and ΣF² of the tensors whose header records them.

    Raises:
        CheckpointError: what is recorded has not the form {tensor: [sum, sum of squares]}.
    """
    moments: dict[str, Moments] = {}
    for metadata in fisher.file_metadata.values():
        if SUMS_KEY not in metadata:
            continue
        for name, pair in _object(metadata[SUMS_KEY], fisher, SUMS_KEY).items():
            if (
                not isinstance(pair, list)
                or len(pair) != 2
                or not all(type(value) in (int, float) and 0 <= value < float("inf") for value in pair)
            ):
                raise CheckpointError(
                    f"{fisher.root}: the sums recorded for {name!r} are {pair!r}, not two numbers",
                    file=str(fisher.root),
                    tensor=name,
                )
            if name in fisher.tensors:
                moments[name] = Moments(float(pair[0]), float(pair[1]), fisher.tensors[name].numel)
    return moments


def _object(text: str, fisher: Checkpoint, key: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{fisher.root}: its metadata {key!r} is no JSON ({error})", file=str(fisher.root)
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{fisher.root}: its metadata {key!r} is no JSON object", file=str(fisher.root))
    return value
