"""Label sources: over which labels y the squared score ∇ log p(y|x) is averaged.

Everything happens at the logits. With p the softmax of the logits, ∇_z log p_y = e_y − p. A label source
turns logits into vectors v, and an engine pulls each back through the model once: the gradient of an example
is Jᵀv and the Fisher estimate is the sum over columns of its elementwise square.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch

from bigmerge.fisher.batch import Scores
from bigmerge.registry import Registry


class LabelSource(ABC):
    """One module in `bigmerge.fisher.labels` (or an entry point of `bigmerge.labels`) adds a label source."""

    name: ClassVar[str]

    def __init__(self, *, seed: int = 0, draws: int = 1) -> None:
        self.seed = seed
        self.draws = draws

    @abstractmethod
    def columns(self, scores: Scores, ids: Sequence[int]) -> Iterator[torch.Tensor]:
        """Vectors v at the logits, (B, S, K) float32 like `scores.logits`, zero where nothing is scored.

        Σ over columns of E[v vᵀ] per example is the covariance of the label's score under this source.
        What is random is keyed by (seed, example id, draw), so it depends on neither
        the batch nor the process.
        """

    @abstractmethod
    def column_count(self, classes: int) -> int:
        """How many backward passes `columns` asks for with `classes` classes."""


LABELS: Registry[LabelSource] = Registry(
    "label source", "bigmerge.fisher.labels", LabelSource, "bigmerge.labels"
)
