"""torch.nn.Linear: y = x Wᵀ + b."""

from __future__ import annotations

import torch

from bigmerge.fisher.rules.base import Rule, is_plain_leaf, own_parameters, runs_forward_of
from bigmerge.fisher.rules.gradients import Dense, ExampleGradients, Outer, by_position


class LinearRule(Rule):
    """∂W = Σ_t g_t x_tᵀ and ∂b = Σ_t g_t."""

    name = "linear"

    @classmethod
    def suits(cls, module: torch.nn.Module) -> bool:
        names = own_parameters(module).keys()
        return (
            runs_forward_of(module, torch.nn.Linear)
            and is_plain_leaf(module)
            and "weight" in names
            and names <= {"weight", "bias"}
        )

    def gradients(self, x: torch.Tensor, g: torch.Tensor) -> dict[str, ExampleGradients]:
        x, g = by_position(x), by_position(g)
        found: dict[str, ExampleGradients] = {"weight": Outer(left=g, right=x)}
        if "bias" in own_parameters(self.module):
            found["bias"] = Dense(g.sum(1, dtype=torch.float32))
        return found
