"""Per-example gradients the plain way: one example, one column, `torch.autograd.grad`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from bigmerge.fisher.batch import Batch
from bigmerge.fisher.engines.backward import columns_and_last
from bigmerge.fisher.engines.base import Score
from bigmerge.fisher.labels.base import LabelSource


def plain_gradients(
    model: torch.nn.Module,
    labels: LabelSource,
    score: Score,
    batch: Batch,
    parameters: Sequence[torch.Tensor],
) -> Iterator[tuple[int, list[torch.Tensor | None]]]:
    """For each example and column: the example's id and the gradient of each of `parameters`.

    None stands for a parameter the example does not use. All parameters must require a gradient.
    """
    for index, example in enumerate(batch.ids):
        scores = score(model, batch.select(index, index + 1))
        for v, last in columns_and_last(labels, scores, (example,)):
            found = torch.autograd.grad(
                scores.logits, list(parameters), v, retain_graph=not last, allow_unused=True
            )
            yield example, list(found)
