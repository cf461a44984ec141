"""What a layer rule is, and how the one for a module is found."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from bigmerge.fisher.rules.gradients import ExampleGradients
from bigmerge.registry import Registry


class Rule(ABC):
    """Per-example gradients of one module's own parameters, from its input x and its output's gradient g.

    One module in `bigmerge.fisher.rules` (or an entry point of `bigmerge.rules`) adds a rule. A rule is exact
    or does not claim the module: what no rule claims is left to the `loop` engine.
    """

    name: ClassVar[str]
    #: among the rules that suit a module, the highest is used; built-in ones that know a type have 0
    precedence: ClassVar[int] = 0
    #: whether it has to be tried on real input that the module treats examples independently
    assumes_separable: ClassVar[bool] = False

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    @classmethod
    @abstractmethod
    def suits(cls, module: torch.nn.Module) -> bool:
        """Whether the rule is exact for every one of `module`'s own parameters. Must not raise."""

    @abstractmethod
    def gradients(self, x: torch.Tensor, g: torch.Tensor) -> dict[str, ExampleGradients]:
        """The gradient of every own parameter for every example.

        Args:
            x: (B, ..., in) or ids (B, ...), what the module was called with, detached.
            g: (B, ..., out), the gradient at its output.

        Returns:
            By the parameter's name in the module. Sums over positions, never over examples.
        """

    def block_bytes(self, x: torch.Tensor, g: torch.Tensor) -> int:
        """Bytes that `gradients` allocates per example of (x, g); the caller passes as many as fit."""
        return 12 * (x[0].numel() + g[0].numel())

    def touched_rows(self, x: torch.Tensor) -> torch.Tensor | None:  # noqa: ARG002
        """(B, T) rows of the weight outside of which the gradient is zero; None if it may be dense."""
        return None


def own_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters registered on `module` itself, by name."""
    return dict(module.named_parameters(recurse=False, remove_duplicate=False))


def runs_forward_of(module: torch.nn.Module, parent: type[torch.nn.Module]) -> bool:
    """Whether calling `module` runs the unchanged forward of `parent`: a subclass may have its own."""
    if not isinstance(module, parent) or type(module).forward is not parent.forward:
        return False
    # Accelerate wraps the forward of an instance to move data between devices and to nothing else.
    return "forward" not in vars(module) or hasattr(module, "_hf_hook")


def is_plain_leaf(module: torch.nn.Module) -> bool:
    """Whether `module` has no submodules and only floating-point parameters of its own."""
    parameters = own_parameters(module)
    return (
        not any(True for _ in module.children())
        and bool(parameters)
        and all(parameter.is_floating_point() for parameter in parameters.values())
    )


def call_with(module: torch.nn.Module, parameters: dict[str, torch.Tensor], x: torch.Tensor) -> Any:
    """`module(x)` with `parameters` in place of its own."""
    return torch.func.functional_call(module, parameters, (x,))


def holds(check: Callable[[], bool]) -> bool:
    """Whether `check` returns True; False where the module cannot even be tried that way."""
    try:
        with torch.no_grad():
            return check()
    except Exception:  # a trial call of foreign code may fail in any way, and all mean "not this rule"
        return False


RULES: Registry[Rule] = Registry("layer rule", "bigmerge.fisher.rules", Rule, "bigmerge.rules")


def rule_for(module: torch.nn.Module) -> Rule | None:
    """The rule for a module that has parameters of its own, or None if none is exact for it."""
    for kind in sorted(RULES, key=lambda rule: -rule.precedence):
        if kind.suits(module):
            return kind(module)
    return None
