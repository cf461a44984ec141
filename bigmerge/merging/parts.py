"""Cutting the steps that are to be done into parts for several processes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from bigmerge.merging.plan import Plan


def split(plan: Plan, steps: Sequence[int], count: int, *, whole_files: bool) -> list[list[int]]:
    """`count` parts, each of consecutive steps, that read and write about the same number of bytes.

    Args:
        plan: the merge.
        steps: numbers of the steps to do, ascending.
        count: how many parts; some are empty where there is not enough to share.
        whole_files: cut only where an output file ends. Needed where the processes run on different machines:
            a network file system may lose what two of them write into one page.
    """
    steps = list(steps)
    bytes_before = np.array([0, *accumulate(plan.step_bytes(plan.step(number)) for number in steps)])
    places = np.arange(len(steps) + 1)
    if whole_files:
        files = [plan.layout.shard_of[plan.tensors[plan.step(number).tensor].name] for number in steps]
        inner = [place for place in range(1, len(steps)) if files[place] != files[place - 1]]
        places = np.array([0, *inner, len(steps)])
    shares = [bytes_before[-1] * part / count for part in range(1, count)]
    cuts = [int(places[np.abs(bytes_before[places] - share).argmin()]) for share in shares]
    return [steps[first:end] for first, end in pairwise([0, *cuts, len(steps)])]
