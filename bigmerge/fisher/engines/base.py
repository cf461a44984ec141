"""Engines: how per-example gradients are squared and summed for one batch on one device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch

from bigmerge.fisher.batch import Batch, Scores
from bigmerge.fisher.labels.base import LabelSource
from bigmerge.registry import Registry

#: runs the model on a batch; `Task.score` bound to a task
Score = Callable[[torch.nn.Module, Batch], Scores]


class Engine(ABC):
    """Adds Σ_n Σ_columns (J_nᵀ v)² of a batch into float32 sums, one per distinct parameter.

    Attributes:
        sums: name (from `model.named_parameters()`, so tied parameters appear once) → float32 tensor of the
            parameter's shape, on its device. The engine only ever adds to it.

    The engine leaves the model as it found it on `close()` (hooks removed, requires_grad restored).
    """

    name: ClassVar[str]

    def __init__(self, model: torch.nn.Module, labels: LabelSource, score: Score, *, memory: int) -> None:
        self.model = model
        self.labels = labels
        self.score = score
        self.memory = memory  # bytes for per-example blocks, beyond the sums and the activations
        self.sums: dict[str, torch.Tensor] = {
            name: torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
            for name, parameter in model.named_parameters()
        }

    @abstractmethod
    def add(self, batch: Batch) -> int:
        """Add every example of `batch` to `sums` and return how many positions were scored.

        Raises:
            EstimationError: a gradient is not finite; the message and data name the example's id.
        """

    @abstractmethod
    def close(self) -> None:
        """Remove hooks and restore requires_grad. Idempotent."""


ENGINES: Registry[Engine] = Registry(
    "per-example engine", "bigmerge.fisher.engines", Engine, "bigmerge.engines"
)
