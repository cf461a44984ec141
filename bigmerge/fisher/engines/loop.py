"""One example at a time, through the model's own gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bigmerge.errors import EstimationError
from bigmerge.fisher.batch import Batch
from bigmerge.fisher.engines.backward import backward_each
from bigmerge.fisher.engines.base import Engine, Score, require_floating
from bigmerge.fisher.engines.finite import check_finite
from bigmerge.fisher.engines.model_state import ModelState
from bigmerge.fisher.labels.base import LabelSource


class LoopEngine(Engine):
    """Exact for every parameter of every model: autograd has summed a parameter's uses when it is seen.

    A gradient is squared, added and freed as soon as the backward pass has finished it, so that no more than
    a few tensors' gradients are alive at a time. For long inputs nothing is faster; for short ones the work
    per example is too small to fill the machine.
    """

    name = "loop"

    def __init__(self, model: torch.nn.Module, labels: LabelSource, score: Score, *, memory: int) -> None:
        super().__init__(model, labels, score, memory=memory)
        require_floating(model)
        self._adding = False  # not so when someone else runs the model
        self._finished: set[str] = set()  # parameters squared in the current backward pass
        self._state = ModelState(model, requires_grad=True)
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._square(name))  # type: ignore[no-untyped-call]
            for name, parameter in model.named_parameters()
        ]

    def _square(self, name: str) -> Callable[[torch.Tensor], None]:
        def square(parameter: torch.Tensor) -> None:
            gradient = parameter.grad
            if gradient is None or not self._adding:
                return
            parameter.grad = None
            if name in self._finished:
                raise EstimationError(
                    f"the gradient of {name} arrived in parts, so its square is not known",
                    hint="turn gradient checkpointing off, or use it with use_reentrant=False",
                    parameter=name,
                )
            self._finished.add(name)
            if gradient.is_sparse:
                gradient = gradient.to_dense()
            gradient = gradient.float()
            self.sums[name].addcmul_(gradient, gradient)

        return square

    def add(self, batch: Batch) -> int:
        scored = torch.zeros((), dtype=torch.int64, device=batch.targets.device)
        self._adding = True
        try:
            for index, example in enumerate(batch.ids):
                with torch.enable_grad():
                    scores = self.score(self.model, batch.select(index, index + 1))
                self._finished.clear()
                for _ in backward_each(self.labels, scores, (example,)):
                    self._finished.clear()
                scored += scores.scored.sum().to(scored.device)
        finally:
            self._adding = False
        check_finite(self, batch)
        return int(scored)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._state.restore()
