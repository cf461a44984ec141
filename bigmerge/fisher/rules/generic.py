"""Any other module without submodules, through its own autograd: convolutions, group norms, gates, ..."""

from __future__ import annotations

import torch

from bigmerge.fisher.rules.base import Rule, call_with, is_plain_leaf, own_parameters
from bigmerge.fisher.rules.gradients import Dense, ExampleGradients


class GenericRule(Rule):
    """Runs the module again on each example alone and asks autograd for Jᵀg.

    Exact for a module that treats examples independently, which the engine tries on real input. It is not
    vectorised over examples: a loop takes any forward, whatever it branches on, and one gradient's memory.
    """

    name = "generic"
    precedence = -2
    assumes_separable = True

    @classmethod
    def suits(cls, module: torch.nn.Module) -> bool:
        # embeddings that EmbeddingRule refused change state or look at the whole batch
        refused = isinstance(module, torch.nn.Embedding) and (
            module.max_norm is not None or module.scale_grad_by_freq
        )
        return is_plain_leaf(module) and not refused

    def gradients(self, x: torch.Tensor, g: torch.Tensor) -> dict[str, ExampleGradients]:
        parameters = {
            name: parameter.detach().requires_grad_()
            for name, parameter in own_parameters(self.module).items()
        }
        blocks = {
            name: torch.zeros(len(x), *parameter.shape, dtype=torch.float32, device=parameter.device)
            for name, parameter in parameters.items()
        }
        for n in range(len(x)):
            with torch.enable_grad():
                output = call_with(self.module, parameters, x[n : n + 1])
            found = torch.autograd.grad(
                output, list(parameters.values()), g[n : n + 1].to(output.dtype), allow_unused=True
            )
            for name, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    blocks[name][n] = gradient
        return {name: Dense(block) for name, block in blocks.items()}

    def block_bytes(self, x: torch.Tensor, g: torch.Tensor) -> int:
        weights = sum(parameter.numel() for parameter in own_parameters(self.module).values())
        return super().block_bytes(x, g) + 8 * weights
