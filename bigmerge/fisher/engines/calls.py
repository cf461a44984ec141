"""Whether a call of a module is one that a rule can be exact for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch


def only_input(
    module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> torch.Tensor | None:
    """The tensor x of a call that amounts to module(x), or None."""
    given = [value for value in (*args, *kwargs.values()) if value is not None]
    if len(given) != 1 or not isinstance(given[0], torch.Tensor):
        return None
    if not (args and args[0] is given[0]):
        first = next(iter(inspect.signature(module.forward).parameters), None)
        if first is None or kwargs.get(first) is not given[0]:
            return None
    return given[0]


def obstacle(x: torch.Tensor | None, output: Any, examples: int) -> str | None:
    """Why the per-example gradients of a call do not follow from its input and output, or None.

    Args:
        x: from `only_input`.
        output: what the module returned.
        examples: B, which must be the first dimension of both; 1 is taken to be broadcast over the batch.
    """
    if x is None:
        return "is called with something else than one tensor"
    if not isinstance(output, torch.Tensor) or not output.is_floating_point():
        return "returns something else than one floating-point tensor"
    if x.dim() == 0 or output.dim() < 2 or len(x) != len(output) or len(output) not in (1, examples):
        return (
            f"maps {tuple(x.shape)} to {tuple(output.shape)}, "
            f"where the first dimension should be that of {examples} examples"
        )
    return None
