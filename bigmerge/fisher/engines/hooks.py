"""A batch at a time, through the inputs and output gradients of the model's layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch

from bigmerge.errors import EstimationError
from bigmerge.fisher.batch import Batch
from bigmerge.fisher.engines.backward import backward_each
from bigmerge.fisher.engines.base import Engine, Score, require_floating
from bigmerge.fisher.engines.calls import obstacle, only_input
from bigmerge.fisher.engines.finite import check_finite
from bigmerge.fisher.engines.model_state import ModelState
from bigmerge.fisher.engines.plan import CoveredModule, make_plan
from bigmerge.fisher.engines.probe import try_plan
from bigmerge.fisher.engines.uses import Group, Use
from bigmerge.fisher.labels.base import LabelSource
from bigmerge.fisher.rules.gradients import Workspace


class HooksEngine(Engine):
    """Exact where every parameter belongs to a layer with a rule; about as fast as a plain backward pass.

    Parameters do not require gradients, so that autograd computes none summed over the batch. Forward hooks
    keep each layer's input x, tensor hooks on its output receive g, and the rules do the rest.

    Raises:
        EstimationError: on construction or with the first batch, the model does something that the rules
            cannot be exact for; the data names every parameter with the reason. See `unsupported`.
    """

    name = "hooks"

    def __init__(self, model: torch.nn.Module, labels: LabelSource, score: Score, *, memory: int) -> None:
        super().__init__(model, labels, score, memory=memory)
        require_floating(model)
        self._plan = make_plan(model)
        _refuse(self._plan.unsupported)
        self._tried = False
        self._recording = False
        self._examples = 0
        self._anchors: dict[torch.device, torch.Tensor] = {}
        self._state = ModelState(model, requires_grad=False)
        workspace = Workspace(memory)
        self._groups: list[Group] = []
        self._hooks = []
        for members in self._plan.groups():
            group = Group(self.sums, workspace)
            self._groups.append(group)
            for item in members:
                hook = self._forward_hook(item, group)
                self._hooks.append(item.module.register_forward_hook(hook, with_kwargs=True))

    @staticmethod
    def unsupported(
        model: torch.nn.Module, score: Score | None = None, batch: Batch | None = None
    ) -> dict[str, str]:
        """Parameters (names from `model.named_parameters()`) that this engine is not exact for → the reason.

        From the modules alone, modules without a rule are found. With `score` and `batch` the first example
        is run as well, which finds parameters used outside of their modules and modules whose input is not
        one tensor with the examples first.
        """
        plan = make_plan(model)
        problems = dict(plan.unsupported)
        if score is not None and batch is not None and not problems:
            problems.update(try_plan(model, plan, score, batch))
        return problems

    def add(self, batch: Batch) -> int:
        if not self._tried:
            _refuse(try_plan(self.model, self._plan, self.score, batch))
            self._tried = True
        for group in self._groups:
            group.begin()
        self._examples = len(batch)
        try:
            with self._record(True):
                with torch.enable_grad():
                    scores = self.score(self.model, batch)
                for group in self._groups:
                    group.seal()
                for _ in backward_each(self.labels, scores, batch.ids):
                    with self._record(False):
                        for group in self._groups:
                            group.finish()
        finally:
            for group in self._groups:
                group.begin()  # lets go of what they keep, also after an error
        check_finite(self, batch)
        return int(scores.scored.sum())

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._state.restore()

    @contextmanager
    def _record(self, recording: bool) -> Iterator[None]:
        before, self._recording = self._recording, recording
        try:
            yield
        finally:
            self._recording = before

    def _forward_hook(self, item: CoveredModule, group: Group) -> Callable[..., torch.Tensor | None]:
        def hook(
            module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
        ) -> torch.Tensor | None:
            # without grad there is no backward through this call: a first pass under reentrant checkpointing
            if not self._recording or not torch.is_grad_enabled():
                return None
            x = only_input(module, args, kwargs)
            reason = obstacle(x, output, self._examples)
            if x is None or reason is not None:
                raise _refusal(dict.fromkeys(item.names.values(), f"{type(module).__name__} {reason}"))
            x, y = x.detach(), cast(torch.Tensor, output)
            if not y.requires_grad:
                y = _StartGraph.apply(y, self._anchor(y.device))  # type: ignore[no-untyped-call]
            if len(y) == 1 < self._examples:
                # positions are often embedded once for all examples; autograd would sum over them
                y = y.expand(self._examples, *y.shape[1:])
                x = x.expand(self._examples, *x.shape[1:])
            seen = self._gradient_hook(group, group.expect(item.rule, item.names, x))
            y.register_hook(seen)  # type: ignore[no-untyped-call]
            return y

        return hook

    def _gradient_hook(self, group: Group, use: Use) -> Callable[[torch.Tensor], None]:
        def hook(g: torch.Tensor) -> None:  # returns nothing: a returned tensor would replace the gradient
            # rules may call the module again, which is no use of it
            with self._record(False), torch.no_grad():
                group.arrive(use, g)

        return hook

    def _anchor(self, device: torch.device) -> torch.Tensor:
        if device not in self._anchors:
            self._anchors[device] = torch.zeros((), device=device, requires_grad=True)
        return self._anchors[device]


class _StartGraph(torch.autograd.Function):
    """A copy that requires a gradient: with frozen parameters nothing before the first layer does.

    It is no leaf, so the model may change it in place and no gradient is stored for it.
    """

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, None]:  # noqa: ARG004
        return None, None


def _refuse(problems: Mapping[str, str]) -> None:
    """Raise if there are problems."""
    if problems:
        raise _refusal(problems)


def _refusal(problems: Mapping[str, str]) -> EstimationError:
    name, reason = next(iter(problems.items()))
    more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
    return EstimationError(
        f"squares of per-example gradients cannot be taken layer by layer: {name}: {reason}{more}",
        hint="use --per-example loop",
        parameters=dict(problems),
    )
