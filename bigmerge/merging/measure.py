"""The measuring pass: ΣF and ΣF² of companion tensors whose headers do not record them."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from bigmerge.checkpoints.checkpoint import TensorSpec, read_json_object
from bigmerge.checkpoints.dtypes import byte_count
from bigmerge.checkpoints.fisher_facts import Moments
from bigmerge.merging import grid
from bigmerge.merging.plan import Plan
from bigmerge.merging.windows import WindowReader
from bigmerge.progress import progress_bar
from bigmerge.storage.inputs import InputFiles
from bigmerge.storage.writing import write_json

#: where what was measured is kept, by companion
MOMENTS = "moments-{}.json"
#: elements after which the kernel is asked to read on
_AHEAD = 1 << 21


class Statistics:
    """What a method must know of whole tensors and whole models before the first block.

    Args:
        moments: companion → model → merged tensor, in the order of `names`.
        names: of the merged tensors.

    Attributes:
        of_model: companion → model → moments over all merged tensors.
    """

    def __init__(self, moments: Mapping[str, list[list[Moments]]], names: Sequence[str]) -> None:
        self._moments = moments
        self._rows = {name: row for row, name in enumerate(names)}
        self.of_model = {
            kind: [sum(row, Moments(0.0, 0.0, 0)) for row in rows] for kind, rows in moments.items()
        }

    def of_tensor(self, name: str) -> dict[str, list[Moments]]:
        """Companion → model → moments over the merged tensor `name`."""
        row = self._rows[name]
        return {kind: [of_model[row] for of_model in rows] for kind, rows in self._moments.items()}


def measure(plan: Plan, scratch: Path, files: InputFiles, *, show_progress: bool) -> Statistics:
    """The moments of each companion that the method asks for.

    Sums are taken in float64 over fixed blocks and folded in order, so they do not depend on the number of
    threads. What was measured is kept in `scratch` for a run that goes on.

    Raises:
        CheckpointError: a file cannot be read.
    """
    found: dict[str, list[list[Moments]]] = {}
    for kind, recorded in plan.recorded.items():
        if kind not in plan.measure:
            found[kind] = [
                [moments[entry.companions[kind][model].name] for entry in plan.alignment.merged]
                for model, moments in enumerate(recorded)
            ]
            continue
        saved = scratch / MOMENTS.format(kind)
        if saved.exists():
            rows = read_json_object(saved)["moments"]
            found[kind] = [[Moments(*values) for values in row] for row in rows]
            continue
        specs = [
            [entry.companions[kind][model] for entry in plan.alignment.merged]
            for model in range(len(plan.recipe.sources))
        ]
        total = sum(spec.nbytes for row in specs for spec in row)
        stop = threading.Event()
        with (
            progress_bar(total=total, unit="B", desc=f"measuring {kind}", show=show_progress) as bar,
            ThreadPoolExecutor(plan.schedule.workers) as pool,
        ):
            rows = []
            try:
                for row in specs:
                    futures = [pool.submit(_moments, spec, files, stop, plan.schedule.window) for spec in row]
                    rows.append([])
                    for spec, future in zip(row, futures, strict=True):
                        rows[-1].append(future.result())
                        bar.update(spec.nbytes)
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise
        found[kind] = rows
        write_json(saved, {"moments": [[[m.total, m.squares, m.elements] for m in row] for row in rows]})
    return Statistics(found, [entry.name for entry in plan.alignment.merged])


def _moments(spec: TensorSpec, files: InputFiles, stop: threading.Event, most: int) -> Moments:
    """Sums over one tensor, read in windows of `most` elements."""
    size = max(grid.SUM_BLOCK, most // grid.SUM_BLOCK * grid.SUM_BLOCK)
    reader = WindowReader(files, [byte_count(spec.dtype, min(size, spec.numel))])
    total = squares = 0.0
    for start in range(0, spec.numel, size):
        if stop.is_set():
            break
        if start % _AHEAD == 0:
            reader.read_ahead(spec, start, min(2 * _AHEAD, spec.numel - start))
        window = reader.read(0, spec, start, min(size, spec.numel - start))
        for first in range(start, start + window.count, grid.SUM_BLOCK):
            part = window.part(first, min(grid.SUM_BLOCK, start + window.count - first))
            block = part.tensor().to(torch.float64)
            total += float(block.sum())
            squares += float(block.square_().sum())
        reader.release(window)
    return Moments(total, squares, spec.numel)
