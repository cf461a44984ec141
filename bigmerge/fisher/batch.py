"""The two values that tasks, label sources and engines pass to each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """Examples as the model takes them.

    Attributes:
        ids: one number per example, its row in the data set: the key of everything random about it.
        inputs: keyword arguments of the model's forward, each with the examples in the first dimension.
        targets: data labels, int64 (B, S) with -100 where nothing is predicted; S is 1 for a classifier.
    """

    ids: tuple[int, ...]
    inputs: dict[str, torch.Tensor]
    targets: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, start: int, stop: int) -> Batch:
        """The examples `start` to `stop` (exclusive) alone."""
        return Batch(
            self.ids[start:stop],
            {name: value[start:stop] for name, value in self.inputs.items()},
            self.targets[start:stop],
        )

    def to(self, device: torch.device) -> Batch:
        """The same examples on `device`."""
        inputs = {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}
        return Batch(self.ids, inputs, self.targets.to(device, non_blocking=True))


@dataclass(frozen=True)
class Scores:
    """What the model says about a batch: a categorical distribution at every scored position.

    Attributes:
        logits: (B, S, K), attached to the graph.
        scored: bool (B, S), the positions whose label counts (padding and ignored positions are False).
        targets: int64 (B, S) data labels, aligned with `logits` (a causal model's are already shifted);
            arbitrary where `scored` is False.
    """

    logits: torch.Tensor
    scored: torch.Tensor
    targets: torch.Tensor
