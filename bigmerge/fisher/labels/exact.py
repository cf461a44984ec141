"""The expectation over all labels, in closed form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from bigmerge.fisher.batch import Scores
from bigmerge.fisher.labels.base import LabelSource, probabilities


class ExactLabels(LabelSource):
    """E_{y~p} of the squared score, exactly, with K − 1 columns per scored position.

    The score's covariance at one position is diag(p) − p pᵀ. It has rank K − 1, and any factor L of it gives
    the same Σ over columns (Jᵀ l_c)². The one used is its Cholesky factor, which has a closed form (Tanabe
    and Sagae, 1992, J. R. Statist. Soc. B 54(1), for the multinomial covariance). With q_c = Σ_{j>c} p_j,

        l_c = √(p_c q_c / q_{c−1}) · (e_c − p_{>c} / q_c),

    that is, "c, or one of the later classes in their own proportions". Two classes need one backward pass.

    Labels at different positions are independent given the input, so the covariance of an example with
    several scored positions is block diagonal and every position has its own columns. The j-th scored
    positions of all examples share columns.
    """

    name = "exact"

    def columns(self, scores: Scores, ids: Sequence[int]) -> Iterator[torch.Tensor]:  # noqa: ARG002
        p = probabilities(scores)
        scored = scores.scored
        order = scored.cumsum(dim=1)  # 1 for an example's first scored position, 2 for its second, ...
        positions = int(scored.sum(dim=1).max()) if len(p) else 0
        for position in range(1, positions + 1):
            here = scored & (order == position)
            # the one row per example that is at this position; examples that have fewer give zero rows
            row = torch.where(here.unsqueeze(-1), p, 0.0).sum(dim=1)
            for column in multinomial_factor(row):
                yield torch.where(here.unsqueeze(-1), column.to(p.dtype).unsqueeze(1), 0.0)

    def column_count(self, classes: int, positions: int = 1) -> int:
        return positions * (classes - 1)


def multinomial_factor(p: torch.Tensor) -> Iterator[torch.Tensor]:
    """The columns l_0 … l_{K−2} of a matrix L with L Lᵀ = diag(p) − p pᵀ, each (B, K) float64.

    Args:
        p: (B, K), each row a distribution; zeros are fine, and a row of zeros gives zeros.
    """
    p = p.double()
    # q[:, c] = Σ_{j>c} p_j, summed from the small end: 1 − Σ_{j≤c} p_j would cancel
    q = p.flip(-1).cumsum(-1).flip(-1)
    for c in range(p.shape[-1] - 1):
        rest, tail = q[:, c : c + 1], q[:, c + 1 : c + 2]
        # the ratio is at most one; taking roots before multiplying keeps the product from underflowing
        scale = p[:, c : c + 1].sqrt() * torch.where(rest > 0, tail / rest, 0.0).sqrt()
        column = torch.zeros_like(p)
        column[:, c : c + 1] = scale
        column[:, c + 1 :] = -scale * torch.where(tail > 0, p[:, c + 1 :] / tail, 0.0)
        yield column
