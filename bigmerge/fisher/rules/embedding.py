"""torch.nn.Embedding, and subclasses that scale its rows by a constant (Gemma, BART)."""

from __future__ import annotations

from typing import cast

import torch

from bigmerge.fisher.rules.base import (
    Rule,
    call_with,
    holds,
    is_plain_leaf,
    own_parameters,
    runs_forward_of,
)
from bigmerge.fisher.rules.gradients import ExampleGradients, Rows


class EmbeddingRule(Rule):
    """∂W = Σ_t e_{id_t} (c∘g_t)ᵀ without the padding row, which autograd does not train either."""

    name = "embedding"

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(module)
        self._scale: torch.Tensor | None = None
        if not runs_forward_of(module, torch.nn.Embedding):
            with torch.no_grad():
                self._scale = _row_scale(module, own_parameters(module)["weight"].dtype).float()

    @classmethod
    def suits(cls, module: torch.nn.Module) -> bool:
        if (
            not isinstance(module, torch.nn.Embedding)
            or not is_plain_leaf(module)
            or own_parameters(module).keys() != {"weight"}
            or module.max_norm is not None  # changes the weight when called
            or module.scale_grad_by_freq  # counts ids over the batch
        ):
            return False
        return runs_forward_of(module, torch.nn.Embedding) or holds(lambda: _only_scales_rows(module))

    def gradients(self, x: torch.Tensor, g: torch.Tensor) -> dict[str, ExampleGradients]:
        ids = x.reshape(len(x), -1)
        values = g.reshape(*ids.shape, g.shape[-1])
        if self._scale is not None:
            values = values * self._scale
        padding = cast(torch.nn.Embedding, self.module).padding_idx
        if padding is not None:
            values = values.masked_fill((ids == padding).unsqueeze(-1), 0.0)
        return {"weight": Rows(ids, values)}

    def touched_rows(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(len(x), -1)


def _row_scale(module: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """(columns,): what the module makes of a row of ones, in the arithmetic of `dtype`."""
    weight = own_parameters(module)["weight"]
    ones = torch.ones((), dtype=dtype, device=weight.device).expand(weight.shape)
    output: torch.Tensor = call_with(module, {"weight": ones}, _some_ids(module))
    return output[0, 0]


def _only_scales_rows(module: torch.nn.Module) -> bool:
    """Whether module(ids) = c∘weight[ids], tried with a weight whose rows are their own index."""
    weight = own_parameters(module)["weight"]
    rows, columns = weight.shape
    index = torch.arange(rows, dtype=torch.float32, device=weight.device).unsqueeze(1).expand(rows, columns)
    ids = _some_ids(module)
    expected = _row_scale(module, torch.float32) * ids.unsqueeze(-1)
    output: torch.Tensor = call_with(module, {"weight": index}, ids)
    return output.shape == expected.shape and torch.allclose(output, expected, rtol=1e-6)


def _some_ids(module: torch.nn.Module) -> torch.Tensor:
    """(2, 3) ids in no order, so that positions cannot pass for them."""
    weight = own_parameters(module)["weight"]
    last = weight.shape[0] - 1
    return torch.tensor([[last, 0, last // 2], [last // 3, last, last]], device=weight.device)
