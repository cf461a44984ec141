"""Engines: how per-example gradients are squared and summed for one batch on one device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch

from bigmerge.errors import EstimationError
from bigmerge.fisher.batch import Batch, Scores
from bigmerge.fisher.labels.base import LabelSource
from bigmerge.registry import Registry

#: runs the model on a batch; `Task.score` bound to a task
Score = Callable[[torch.nn.Module, Batch], Scores]


class Engine(ABC):
    """Adds Σ_n Σ_columns (J_nᵀ v)² of a batch into float32 sums, one per distinct parameter.

    From construction to `close()` the model is the engine's: in evaluation mode, its `requires_grad` as the
    engine needs it, every `.grad` dropped. `close()` removes the hooks and restores modes and flags.

    Args:
        model: measured where it is; parameters may be on several devices and of any floating dtype.
        labels: which vectors at the logits to pull back.
        score: runs the model on a batch.
        memory: bytes for per-example blocks, beyond the sums, the activations and one weight's gradient.

    Attributes:
        sums: name (from `model.named_parameters()`, so tied parameters appear once) → float32 tensor of the
            parameter's shape, on its device. The engine only ever adds to it.
    """

    name: ClassVar[str]

    def __init__(self, model: torch.nn.Module, labels: LabelSource, score: Score, *, memory: int) -> None:
        self.model = model
        self.labels = labels
        self.score = score
        self.memory = memory
        self.sums: dict[str, torch.Tensor] = {
            name: torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
            for name, parameter in model.named_parameters()
        }

    @abstractmethod
    def add(self, batch: Batch) -> int:
        """Add every example of `batch` to `sums` and return how many positions were scored.

        The batch's tensors are where the model wants its inputs.

        Raises:
            EstimationError: a gradient is not finite (the message and data name the example's id), or the
                model did something the engine cannot be exact for. `sums` is then of no use.
        """

    @abstractmethod
    def close(self) -> None:
        """Remove hooks, restore modes and requires_grad. Idempotent."""


def require_floating(model: torch.nn.Module) -> None:
    """Refuse a model with parameters that have no gradient.

    Raises:
        EstimationError: some parameters are integers (a quantized model).
    """
    fixed = [name for name, parameter in model.named_parameters() if not parameter.is_floating_point()]
    if fixed:
        raise EstimationError(
            f"{len(fixed)} parameters have no gradient because they are not floating point, e.g. {fixed[0]}",
            hint="measure the Fisher on the model before quantization",
            parameters=fixed,
        )


ENGINES: Registry[Engine] = Registry(
    "per-example engine", "bigmerge.fisher.engines", Engine, "bigmerge.engines"
)
