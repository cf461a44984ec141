"""Runs a method on whole vectors in float64, without files: what the engine does to each block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bigmerge.checkpoints.fisher_facts import Moments
from bigmerge.merging.blocks import Scratch
from bigmerge.methods.base import Method, View, build_method


def moments(values: torch.Tensor) -> Moments:
    wide = values.double()
    return Moments(float(wide.sum()), float(wide.square().sum()), values.numel())


def combine(
    method: Method | str,
    models: Sequence[Any],
    *,
    weights: Sequence[float] | None = None,
    fishers: Sequence[Any] = (),
    measured: Sequence[Any] = (),
    target: int = 0,
    dtype: torch.dtype = torch.float64,
    **parameters: Any,
) -> torch.Tensor:
    """The merge of flat lists or vectors by `method` (or the method of that name with `parameters`).

    Args:
        measured: the whole Fishers, where `fishers` are only a part of them.
    """
    if isinstance(method, str):
        method = build_method(method, parameters)
    stored = [torch.as_tensor(model, dtype=dtype).flatten() for model in models]
    companions = {"fisher": [torch.as_tensor(f, dtype=dtype).flatten() for f in fishers]} if fishers else {}
    known = {"fisher": [moments(torch.as_tensor(f)) for f in measured or fishers]} if fishers else {}
    weights = list(weights) if weights is not None else [1.0] * len(stored)
    method.check(weights)
    view = VectorView(stored, companions, known, weights, target, method.buffers(len(stored)))
    return method.combine(view).clone()


class VectorView(View):
    """A view of whole vectors, which holds the method to the buffers that it claims."""

    tensor = "tensor"

    def __init__(
        self,
        models: Sequence[torch.Tensor],
        companions: Mapping[str, Sequence[torch.Tensor]],
        known: Mapping[str, Sequence[Moments]],
        weights: Sequence[float],
        target: int,
        claimed: int,
    ) -> None:
        self.weights = weights
        self.target = target
        self.tensor_moments = self.model_moments = known
        self._models = models
        self._companions = companions
        self._scratch = Scratch(max(1, models[0].numel()), claimed, torch.device("cpu"))

    def theta(self, model: int) -> torch.Tensor:
        return self.scratch().copy_(self._models[model])

    def companion(self, kind: str, model: int) -> torch.Tensor:
        return self.scratch().copy_(self._companions[kind][model])

    def scratch(self) -> torch.Tensor:
        return self._scratch.take(self._models[0].numel(), self._models[0].dtype)

    def give_back(self, *buffers: torch.Tensor) -> None:
        for buffer in buffers:
            self._scratch.give_back(buffer)
