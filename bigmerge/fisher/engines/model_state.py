"""The model's modes and flags, taken over while it is measured and given back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class ModelState:
    """Puts a model into evaluation mode and sets `requires_grad` of all parameters, until `restore()`."""

    def __init__(self, model: torch.nn.Module, *, requires_grad: bool) -> None:
        self._training = [(module, module.training) for module in model.modules()]
        self._requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        model.eval()  # dropout off; sets the flag on every module
        for parameter in model.parameters():
            parameter.requires_grad_(requires_grad)
            parameter.grad = None

    def restore(self) -> None:
        """Idempotent."""
        for module, training in self._training:
            module.training = training
        for parameter, requires_grad in self._requires_grad:
            parameter.requires_grad_(requires_grad)
            parameter.grad = None
        self._training, self._requires_grad = [], []


@contextmanager
def plainly_differentiable(model: torch.nn.Module) -> Iterator[None]:
    """Every parameter requires a gradient and the model evaluates, inside the block."""
    state = ModelState(model, requires_grad=True)
    try:
        with torch.enable_grad():
            yield
    finally:
        state.restore()
