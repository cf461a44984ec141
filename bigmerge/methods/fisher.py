"""Fisher merging: the average weighted, parameter by parameter, by diagonal Fisher information."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from bigmerge.checkpoints.fisher_facts import Moments
from bigmerge.errors import BigmergeError, UsageError
from bigmerge.methods.base import Method, View

if TYPE_CHECKING:
    import torch

#: what the authors' implementation raises a Fisher to (fisher_floor in mmatena/model_merging)
REFERENCE_FLOOR = 1e-6


@dataclass(frozen=True)
class Fisher(Method):
    """θ* = Σ cᵢθᵢ / Σ cᵢ with cᵢ = λᵢsᵢFᵢ, computed as θ_t + Σ cᵢ(θᵢ − θ_t) / Σ cᵢ (eq. 4 of the paper).

    sᵢ makes Fishers comparable (`normalize`); where Σ cᵢ is zero, `zero` decides. With `floor` the reference
    implementation's absolute floor is applied to the stored values first; on Fishers below 1e-6 it turns the
    merge into the target or the plain average, so it serves comparison only.
    """

    name: ClassVar[str] = "fisher"
    summary: ClassVar[str] = "average weighted by each model's diagonal Fisher information"
    source: ClassVar[str] = (
        "Matena & Raffel 2022, Merging Models with Fisher-Weighted Averaging (arXiv 2111.09832)"
    )
    companions: ClassVar[tuple[str, ...]] = ("fisher",)

    normalize: Literal["none", "model", "tensor", "l2"] = field(
        default="model",
        metadata={
            "help": "Make Fishers comparable: `model` gives each the same trace over the merged tensors, "
            "`tensor` the same trace in each tensor, `l2` the same L2 norm (the reference implementation's "
            "choice), `none` takes them as stored."
        },
    )
    zero: Literal["target", "average", "error"] = field(
        default="target",
        metadata={
            "help": "Where every model's Fisher is zero: keep the target's value, average by λ, or stop."
        },
    )
    epsilon: float = field(
        default=0.0,
        metadata={
            "help": "What counts as zero: Σ λF/mean(F) at or below this, λ summing to one. Relative to each "
            "model's mean Fisher, so it does not depend on the Fishers' scale."
        },
    )
    floor: Literal["none", "reference-target", "reference-all"] = field(
        default="none",
        metadata={
            "help": "Compatibility with the reference implementation: raise the target's (its default) or "
            "every model's stored Fisher to at least 1e-6."
        },
    )

    def __post_init__(self) -> None:
        if not (self.epsilon >= 0 and math.isfinite(self.epsilon)):
            raise UsageError(f"epsilon: {self.epsilon} is no number from zero upwards")

    def check(self, weights: Sequence[float]) -> None:
        if min(weights) < 0 or sum(weights) <= 0:
            raise UsageError(
                f"Fisher merging needs weights that are not negative and not all zero, got {list(weights)}",
                hint="change --weight",
                weights=list(weights),
            )

    def statistics(self) -> tuple[str, ...]:
        return ("fisher",) if self.normalize != "none" or self.epsilon > 0 else ()

    def buffers(self, models: int) -> int:
        del models
        return 6 if self.epsilon > 0 else 5

    def combine(self, view: View) -> torch.Tensor:
        whole = sum(view.weights)
        shares = [weight / whole for weight in view.weights]
        center = view.theta(view.target)
        moved: torch.Tensor | None = None  # Σ cᵢ(θᵢ − θ_t)
        mass: torch.Tensor | None = None  # Σ cᵢ
        relative = view.scratch().zero_() if self.epsilon > 0 else None  # Σ λᵢFᵢ/mean(Fᵢ)
        for model, share in enumerate(shares):
            if share == 0:
                continue
            fisher = view.companion("fisher", model)
            if relative is not None:
                relative.add_(fisher, alpha=share * _inverse(view.model_moments["fisher"][model].mean))
            if self.floor == "reference-all" or (self.floor == "reference-target" and model == view.target):
                fisher.clamp_(min=REFERENCE_FLOOR)
            fisher.mul_(share * self._scale(view, model))
            if model != view.target:
                theta = view.theta(model).sub_(center)
                if moved is None:
                    moved = theta.mul_(fisher)
                else:
                    moved.addcmul_(fisher, theta)
                    view.give_back(theta)
            if mass is None:
                mass = fisher
            else:
                mass.add_(fisher)
                view.give_back(fisher)
        assert mass is not None  # `check` has seen that some weight is positive
        if moved is None:
            moved = view.scratch().zero_()
        if (mass if relative is None else relative).amin() <= self.epsilon:
            nothing = (mass if relative is None else relative) <= self.epsilon
            mass.masked_fill_(nothing, 1.0)
            moved.masked_fill_(nothing, 0.0)
            if self.zero == "error":
                raise BigmergeError(
                    f"tensor {view.tensor!r}: {int(nothing.sum())} parameters of one block have no Fisher "
                    "mass in any model",
                    hint="use --fisher-zero target or average, or exclude the tensor",
                    tensor=view.tensor,
                )
            if self.zero == "average":
                for model, share in enumerate(shares):
                    if model != view.target and share:
                        theta = view.theta(model).sub_(center).mul_(nothing)
                        moved.add_(theta, alpha=share)
                        view.give_back(theta)
        result = moved.div_(mass).add_(center)
        view.give_back(center, mass)
        if relative is not None:
            view.give_back(relative)
        return result

    def _scale(self, view: View, model: int) -> float:
        if self.normalize == "none":
            return 1.0
        per_tensor = self.normalize == "tensor"
        moments: Moments = (view.tensor_moments if per_tensor else view.model_moments)["fisher"][model]
        if self.normalize == "l2":
            return _inverse(math.sqrt(moments.squares))
        return _inverse(moments.mean)


def _inverse(value: float) -> float:
    """1/value; an all-zero Fisher has no scale and stays zero."""
    return 1.0 / value if value > 0 else 0.0
