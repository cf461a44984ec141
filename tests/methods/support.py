"""Runs a method on whole vectors in float64, without files: what the engine does to each block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bigmerge.checkpoints.fisher_facts import Moments
from bigmerge.merging.windows import BlockView, Scratch
from bigmerge.methods.base import Method, build_method


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
    count = stored[0].numel()
    view = BlockView(
        "tensor",
        weights=weights,
        target=target,
        models=stored,
        companions=companions,
        specs={},
        tensor_moments=known,
        model_moments=known,
        scratch=Scratch(max(count, 1), method.buffers(len(stored))),
        dtype=dtype,
    )
    view.move(0, count)
    return method.combine(view).clone()
