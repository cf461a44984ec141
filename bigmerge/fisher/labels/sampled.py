"""Labels drawn from the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from bigmerge.fisher.batch import Scores
from bigmerge.fisher.labels.base import LabelSource, label_score, probabilities

#: entries of the float64 cumulative distributions that are alive at once (32 MiB)
_CDF_ENTRIES = 4 * 1024 * 1024


class SampledLabels(LabelSource):
    """`draws` labels y ~ p at every scored position, v = (e_y − p)/√draws: unbiased, one backward per draw.

    The t-th scored position of an example always gets the same uniform number for the same seed and draw,
    whatever the batch, its padding, the order of the examples or the process. The score of a model's own
    labels has mean zero, so the cross terms between the positions of a sequence vanish in expectation.
    """

    name = "sampled"

    def columns(self, scores: Scores, ids: Sequence[int]) -> Iterator[torch.Tensor]:
        p = probabilities(scores)
        scored = scores.scored
        rank = (scored.cumsum(dim=1) - 1).clamp_min(0)
        for draw in range(self.draws):
            numbers = uniform_numbers(self.seed, ids, draw, scored.shape[1])
            labels = inverse_cdf(p, numbers.to(p.device).gather(1, rank))
            v = label_score(p, labels, scored)
            yield v if self.draws == 1 else v.mul_(self.draws**-0.5)

    def column_count(self, classes: int, positions: int = 1) -> int:  # noqa: ARG002
        return self.draws


def uniform_numbers(seed: int, ids: Sequence[int], draw: int, count: int) -> torch.Tensor:
    """Uniform numbers in [0, 1), float64 (len(ids), count), each row a function of (seed, id, draw) alone.

    A longer row begins with the shorter one. Philox (Salmon et al., SC 2011) is keyed by seed and id and
    counts from the draw; its raw stream is fixed by NumPy's compatibility policy.
    """
    rows = np.empty((len(ids), count), dtype=np.float64)
    for row, example in zip(rows, ids, strict=True):
        key = np.array([seed % 2**64, example % 2**64], dtype=np.uint64)
        # the counter's lowest word advances with the stream, so draws get a higher word
        stream = np.random.Philox(key=key, counter=np.array([0, draw, 0, 0], dtype=np.uint64))
        row[:] = (stream.random_raw(count) >> np.uint64(11)) * 2.0**-53
    return torch.from_numpy(rows)


def inverse_cdf(p: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The label at each of the quantiles `numbers`; never one of probability zero.

    Args:
        p: (..., K) probabilities.
        numbers: float64 (...), each in [0, 1).

    Returns:
        int64 (...).
    """
    classes = p.shape[-1]
    rows, quantiles = p.reshape(-1, classes), numbers.reshape(-1, 1)
    labels = torch.empty(len(rows), dtype=torch.int64, device=p.device)
    step = max(1, _CDF_ENTRIES // classes)
    for start in range(0, len(rows), step):
        cdf = rows[start : start + step].double().cumsum(dim=-1)
        total = cdf[:, -1:]
        # below the total even after rounding, so that the label is the last possible one at most
        below = torch.minimum(
            quantiles[start : start + step] * total, torch.nextafter(total, torch.zeros_like(total))
        )
        found = torch.searchsorted(cdf, below, right=True)
        labels[start : start + step] = found.squeeze(1).clamp_max_(classes - 1)
    return labels.view(numbers.shape)
