"""transformers' Conv1D, a linear layer with the weight stored transposed (GPT-2): y = x W + b."""

from __future__ import annotations

import torch

from bigmerge.fisher.rules.base import Rule, own_parameters
from bigmerge.fisher.rules.gradients import Dense, ExampleGradients, Outer, by_position


class Conv1DRule(Rule):
    """∂W = Σ_t x_t g_tᵀ and ∂b = Σ_t g_t."""

    name = "conv1d"

    @classmethod
    def suits(cls, module: torch.nn.Module) -> bool:
        # by name, because importing transformers to ask takes seconds
        kind = type(module)
        return (
            (kind.__module__, kind.__qualname__) == ("transformers.pytorch_utils", "Conv1D")
            and own_parameters(module).keys() == {"weight", "bias"}
            and ("forward" not in vars(module) or hasattr(module, "_hf_hook"))
        )

    def gradients(self, x: torch.Tensor, g: torch.Tensor) -> dict[str, ExampleGradients]:
        x, g = by_position(x), by_position(g)
        return {"weight": Outer(left=x, right=g), "bias": Dense(g.sum(1, dtype=torch.float32))}
