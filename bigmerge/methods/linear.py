"""The weighted average (isotropic merging, uniform and weighted model soups)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from bigmerge.errors import UsageError
from bigmerge.methods.base import Method, View

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Linear(Method):
    """θ* = Σ λᵢθᵢ / Σ λᵢ, computed as θ_t + Σ wᵢ(θᵢ − θ_t) with wᵢ = λᵢ / Σλ.

    In this form models that agree give back their common value bit for bit.
    """

    name: ClassVar[str] = "linear"
    summary: ClassVar[str] = "weighted average of the models"
    source: ClassVar[str] = "Wortsman et al. 2022, Model soups (arXiv 2203.05482)"

    normalize: bool = field(
        default=True, metadata={"help": "Divide the weights by their sum; otherwise a plain weighted sum."}
    )

    def check(self, weights: Sequence[float]) -> None:
        if self.normalize and sum(weights) == 0:
            raise UsageError(
                "the weights sum to zero, so they cannot be normalised",
                hint="change --weight",
                weights=weights,
            )

    def buffers(self, models: int) -> int:
        del models
        return 3

    def combine(self, view: View) -> torch.Tensor:
        if not self.normalize:
            result = view.theta(0).mul_(view.weights[0])
            for model in range(1, len(view.weights)):
                theta = view.theta(model)
                result.add_(theta, alpha=view.weights[model])
                view.give_back(theta)
            return result
        import torch

        whole = sum(view.weights)
        center = view.theta(view.target)
        moved: torch.Tensor | None = None
        for model, weight in enumerate(view.weights):
            if model == view.target:
                continue
            theta = view.theta(model).sub_(center)
            if moved is None:
                moved = torch.add(center, theta, alpha=weight / whole, out=theta)
            else:
                moved.add_(theta, alpha=weight / whole)
                view.give_back(theta)
        if moved is None:
            return center
        view.give_back(center)
        return moved
