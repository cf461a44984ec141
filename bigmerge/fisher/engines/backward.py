"""One forward pass, one backward pass per column."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from bigmerge.fisher.batch import Scores
from bigmerge.fisher.labels.base import LabelSource


def columns_and_last(
    labels: LabelSource, scores: Scores, ids: Sequence[int]
) -> Iterator[tuple[torch.Tensor, bool]]:
    """Every column in the dtype of the logits, and whether it is the last one (the graph may be freed)."""
    columns = iter(labels.columns(scores, ids))
    current = next(columns, None)
    while current is not None:
        following = next(columns, None)
        yield current.to(scores.logits.dtype), following is None
        current = following


def backward_each(labels: LabelSource, scores: Scores, ids: Sequence[int]) -> Iterator[None]:
    """Run the backward pass of each column in turn; yields after each."""
    for v, last in columns_and_last(labels, scores, ids):
        torch.autograd.backward([scores.logits], [v], retain_graph=not last)
        yield
