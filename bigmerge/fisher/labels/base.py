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

from bigmerge.errors import UsageError
from bigmerge.fisher.batch import Scores
from bigmerge.registry import Registry


class LabelSource(ABC):
    """One module in `bigmerge.fisher.labels` (or an entry point of `bigmerge.labels`) adds a label source.

    Args:
        seed: of everything random.
        draws: labels drawn per scored position, for sources that draw.

    Raises:
        UsageError: `draws` is less than one.
    """

    name: ClassVar[str]
    #: whether `Scores.targets` are looked at; where not, examples need no data labels
    needs_targets: ClassVar[bool] = False

    def __init__(self, *, seed: int = 0, draws: int = 1) -> None:
        if draws < 1:
            raise UsageError(f"{draws} label draws per position cannot estimate anything", draws=draws)
        self.seed = seed
        self.draws = draws

    @abstractmethod
    def columns(self, scores: Scores, ids: Sequence[int]) -> Iterator[torch.Tensor]:
        """Vectors v at the logits, (B, S, K), zero where nothing is scored.

        They are float32, or float64 where the logits are. Σ over columns of E[v vᵀ] per example is the
        covariance of the label's score under this source. What is random is keyed by
        (seed, example id, draw), so it depends on neither the batch nor the process.
        """

    @abstractmethod
    def column_count(self, classes: int, positions: int = 1) -> int:
        """How many backward passes `columns` asks for.

        Args:
            classes: K.
            positions: the most positions that are scored in one example of the batch.
        """


def probabilities(scores: Scores) -> torch.Tensor:
    """p, the softmax of the logits, detached: (B, S, K) float32, or float64 where the logits are."""
    logits = scores.logits.detach()
    return torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def label_score(p: torch.Tensor, labels: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """e_y − p where a position is scored and zero elsewhere.

    Args:
        p: (B, S, K) probabilities.
        labels: int64 (B, S), each y; anything where `scored` is False.
        scored: bool (B, S).
    """
    labels = labels.masked_fill(~scored, 0).unsqueeze(-1)
    v = p.neg().scatter_add_(2, labels, torch.ones_like(labels, dtype=p.dtype))
    # filled, not multiplied: logits of padding may be NaN
    return v.masked_fill_(~scored.unsqueeze(-1), 0.0)


LABELS: Registry[LabelSource] = Registry(
    "label source", "bigmerge.fisher.labels", LabelSource, "bigmerge.labels"
)
