"""Labels of the data set: the empirical Fisher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from bigmerge.fisher.batch import Scores
from bigmerge.fisher.labels.base import LabelSource, label_score, probabilities


class EmpiricalLabels(LabelSource):
    """v = e_target − p: squares the gradient of the log-likelihood of the data.

    This is not the Fisher information (Kunstner, Balles and Hennig, 2019, arXiv:1905.12558): it vanishes
    where the model fits its data, and the positions of a sequence do not decouple.
    """

    name = "empirical"
    needs_targets = True

    def columns(self, scores: Scores, ids: Sequence[int]) -> Iterator[torch.Tensor]:  # noqa: ARG002
        yield label_score(probabilities(scores), scores.targets, scores.scored)

    def column_count(self, classes: int, positions: int = 1) -> int:  # noqa: ARG002
        return 1
