"""torch.nn.LayerNorm: y = w∘x̂ + b."""

from __future__ import annotations

from typing import cast

import torch

from bigmerge.fisher.rules.base import Rule, is_plain_leaf, own_parameters, runs_forward_of
from bigmerge.fisher.rules.gradients import Dense, ExampleGradients


class LayerNormRule(Rule):
    """∂w = Σ_t g_t∘x̂_t and ∂b = Σ_t g_t, with x̂ the normalised input."""

    name = "layer_norm"

    @classmethod
    def suits(cls, module: torch.nn.Module) -> bool:
        return (
            runs_forward_of(module, torch.nn.LayerNorm)
            and is_plain_leaf(module)
            and own_parameters(module).keys() <= {"weight", "bias"}
        )

    def gradients(self, x: torch.Tensor, g: torch.Tensor) -> dict[str, ExampleGradients]:
        module = cast(torch.nn.LayerNorm, self.module)
        shape = module.normalized_shape
        found: dict[str, ExampleGradients] = {}
        g = g.float()
        if "weight" in own_parameters(module):
            normalised = torch.nn.functional.layer_norm(x.float(), list(shape), eps=module.eps)
            found["weight"] = Dense((normalised.mul_(g)).reshape(len(x), -1, *shape).sum(1))
        if "bias" in own_parameters(module):
            found["bias"] = Dense(g.reshape(len(x), -1, *shape).sum(1))
        return found
