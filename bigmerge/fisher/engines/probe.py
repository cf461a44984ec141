"""Tries on one real example whether the rules see everything a model does with its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from bigmerge.fisher.batch import Batch
from bigmerge.fisher.engines.base import Score
from bigmerge.fisher.engines.calls import obstacle, only_input
from bigmerge.fisher.engines.model_state import plainly_differentiable
from bigmerge.fisher.engines.plan import CoveredModule, Plan
from bigmerge.fisher.rules.base import holds


def try_plan(model: torch.nn.Module, plan: Plan, score: Score, batch: Batch) -> dict[str, str]:
    """Parameters that the plan's rules would be wrong for → the reason.

    Runs the first example of `batch` alone: then the first dimension of every module's input and output must
    be 1, which tells inputs with flattened or leading positions from batches. Besides, a parameter must only
    be used by the module it belongs to (not as `F.linear(x, layer.weight)`), and modules under a rule that
    assumes independent examples are run on two.
    """
    watch = _Watch(plan)
    with plainly_differentiable(model), watch.hooked():
        score(model, batch.select(0, 1))
    return watch.problems


class _Watch(TorchFunctionMode):
    """Follows which module is running, and which parameters torch functions are given."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.problems: dict[str, str] = {}
        self._plan = plan
        self._name_of = {
            id(parameter): item.names[local]
            for item in plan.covered
            for local, parameter in item.module.named_parameters(recurse=False, remove_duplicate=False)
        }
        self._running: list[CoveredModule] = []
        self._paused = False

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles = []
        for item in self._plan.covered:
            handles.append(item.module.register_forward_pre_hook(self._entered(item)))
            handles.append(
                item.module.register_forward_hook(self._left(item), with_kwargs=True, always_call=True)
            )
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _entered(self, item: CoveredModule) -> Callable[..., None]:
        def enter(module: torch.nn.Module, args: Any) -> None:  # noqa: ARG001
            if not self._paused:
                self._running.append(item)

        return enter

    def _left(self, item: CoveredModule) -> Callable[..., None]:
        def leave(
            module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
        ) -> None:
            if self._paused:
                return
            self._running.pop()
            x = only_input(module, args, kwargs)
            reason = obstacle(x, output, 1)
            if reason is None and x is not None and item.rule.assumes_separable:
                self._paused = True  # the module is called again, which must not be watched
                try:
                    if not holds(lambda: _is_separable(module, x, output)):
                        reason = "could not be shown to treat examples independently"
                finally:
                    self._paused = False
            if reason is not None:
                for name in item.names.values():
                    self.problems.setdefault(name, f"{type(module).__name__} {reason}")

        return leave

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # Reading an attribute (dtype, shape, data) is no use; a use makes something that has a gradient.
        if not self._paused and _requires_grad(result):
            for value in _tensors((args, kwargs or {})):
                name = self._name_of.get(id(value))
                if name is not None and not self._belongs_to_running(value):
                    operation = getattr(func, "__name__", str(func))
                    self.problems.setdefault(name, f"is used outside of its module, by {operation}")
        return result

    def _belongs_to_running(self, parameter: torch.Tensor) -> bool:
        return bool(self._running) and any(
            parameter is own for own in self._running[-1].module.parameters(recurse=False)
        )


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)


def _requires_grad(value: Any) -> bool:
    return any(tensor.requires_grad and not tensor.is_leaf for tensor in _tensors(value))


def _is_separable(module: torch.nn.Module, x: torch.Tensor, output: torch.Tensor) -> bool:
    """Whether the output for `x` stays the same next to a second, different example."""
    other = x.flip(-1) if not x.is_floating_point() else x * 0.5 + 1.0
    together: torch.Tensor = module(torch.cat((x, other)))
    tolerance = 16 * torch.finfo(output.dtype).eps
    close = torch.allclose(together[:1], output, rtol=tolerance, atol=tolerance * float(output.abs().max()))
    return together.shape[0] == 2 and close
