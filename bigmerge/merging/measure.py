"""The measuring pass: ΣF and ΣF² of companion tensors whose headers do not record them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from bigmerge.checkpoints.checkpoint import TensorSpec, read_json_object
from bigmerge.checkpoints.fisher_facts import Moments
from bigmerge.merging.plan import BLOCK, Plan
from bigmerge.merging.windows import Window
from bigmerge.progress import progress_bar
from bigmerge.storage.mapping import Mappings
from bigmerge.storage.writing import write_json


def measure_moments(
    plan: Plan, scratch: Path, mappings: Mappings, *, show_progress: bool
) -> Mapping[str, list[list[Moments]]]:
    """Moments of each companion that the method asks for: kind → model → merged tensor, in alignment order.

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
        saved = scratch / f"moments-{kind}.json"
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
            ThreadPoolExecutor(plan.workers) as pool,
        ):
            rows = []
            try:
                for row in specs:
                    futures = [pool.submit(_moments, spec, mappings, stop) for spec in row]
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
    return found


def _moments(spec: TensorSpec, mappings: Mappings, stop: threading.Event) -> Moments:
    total = squares = 0.0
    for first in range(0, spec.numel, BLOCK):
        if stop.is_set():
            break
        window = Window(spec, first, min(BLOCK, spec.numel - first), mappings)
        window.populate()
        block = window.tensor().to(torch.float64)
        window.release()
        total += float(block.sum())
        squares += float(block.square_().sum())
    return Moments(total, squares, spec.numel)
