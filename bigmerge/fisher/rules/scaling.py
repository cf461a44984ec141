"""Modules y = a(x) + w∘d(x) with one weight vector: RMS norms of all families, layer scales.

There are hundreds of RMS-norm classes, with weights around one (Llama, Qwen, Mistral, T5) or around zero
(Gemma), with casts before or after. They are recognised by what they compute, not by their names.
"""

from __future__ import annotations

import torch

from bigmerge.fisher.rules.base import Rule, call_with, holds, is_plain_leaf, own_parameters
from bigmerge.fisher.rules.gradients import Dense, ExampleGradients, by_position


class ScalingRule(Rule):
    """∂w = Σ_t g_t∘d(x_t), where d(x) = f(x; w=1) − f(x; w=0) is read off the module's own forward f."""

    name = "scaling"
    precedence = -1

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(module)
        ((self._weight, parameter),) = own_parameters(module).items()
        self._one = torch.ones(parameter.shape, dtype=torch.float32, device=parameter.device)
        self._zero = torch.zeros_like(self._one)
        with torch.no_grad():
            # a(x) = 0 for all but the weights around zero, and then one evaluation is enough
            at_zero = call_with(module, {self._weight: self._zero}, _trial_input(parameter))
            self._has_offset = bool(at_zero.any())

    @classmethod
    def suits(cls, module: torch.nn.Module) -> bool:
        parameters = own_parameters(module)
        if not is_plain_leaf(module) or len(parameters) != 1:
            return False
        ((name, parameter),) = parameters.items()
        # a weight of one element might be broadcast, and then the trial would not tell
        if parameter.dim() != 1 or len(parameter) < 2:
            return False
        return holds(lambda: _is_linear_in_weight(module, name, parameter))

    def gradients(self, x: torch.Tensor, g: torch.Tensor) -> dict[str, ExampleGradients]:
        with torch.no_grad():
            x = x.float()
            direction = call_with(self.module, {self._weight: self._one}, x)
            if self._has_offset:
                direction = direction - call_with(self.module, {self._weight: self._zero}, x)
            return {self._weight: Dense(by_position(direction * g).sum(1))}

    def block_bytes(self, x: torch.Tensor, g: torch.Tensor) -> int:
        return 24 * (x[0].numel() + g[0].numel())


def _trial_input(parameter: torch.Tensor) -> torch.Tensor:
    """(2, 3, features) of fixed numbers without structure."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, len(parameter), generator=generator).to(parameter.device)


def _is_linear_in_weight(module: torch.nn.Module, name: str, parameter: torch.Tensor) -> bool:
    """Whether f(x; w) = f(x; 0) + w∘(f(x; 1) − f(x; 0)) for a random w, examples and positions apart."""
    x = _trial_input(parameter)
    weight = x[1, 2].flip(0).contiguous()
    zero, one = torch.zeros_like(weight), torch.ones_like(weight)

    def f(w: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = call_with(module, {name: w}, at)
        return output

    offset, unit, output = f(zero, x), f(one, x), f(weight, x)
    return (
        output.shape == x.shape
        and bool(output.isfinite().all())
        and torch.allclose(output, offset + weight * (unit - offset), rtol=1e-5, atol=1e-5)
        and torch.allclose(output[:1, 1:2], f(weight, x[:1, 1:2]), rtol=1e-5, atol=1e-5)
    )
