"""The loop over one process's examples."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bigmerge.errors import BigmergeError, Interrupted, OutputError
from bigmerge.fisher.batch import Batch
from bigmerge.fisher.data import Rows
from bigmerge.fisher.device_memory import device_memory
from bigmerge.fisher.engines.base import Engine
from bigmerge.fisher.interruption import StopRequest
from bigmerge.fisher.state import Progress, SavedState
from bigmerge.fisher.tasks.base import Task
from bigmerge.processes import Notices

logger = logging.getLogger("bigmerge.fisher")


@dataclass(frozen=True)
class Examples:
    """Rows as batches of a task, tokenized when their turn comes, so that no text is held."""

    rows: Rows
    task: Task
    device: torch.device

    def batch(self, ids: Sequence[int]) -> Batch:
        """The examples with these ids, padded, on the device."""
        return self.task.collate([(row, self.task.encode(self.rows[row], row)) for row in ids]).to(
            self.device
        )


def add_examples(
    engine: Engine,
    examples: Examples,
    batches: Iterable[tuple[int, ...]],
    progress: Progress,
    *,
    state: SavedState,
    notices: Notices,
    stop: StopRequest,
    bar: Any,
) -> None:
    """Add every batch to the engine's sums, saving them now and then, and wait for the other processes.

    Args:
        batches: ids, in the order of the plan; those that `progress` has already are left out.
        progress: brought up to date with every batch.
        bar: a progress bar whose `update` takes a number of this process's examples.

    Raises:
        Interrupted: a stop was asked for; what is finished has been saved.
        ResourceError: the device has too little memory.
        EstimationError: a gradient is not finite.
        BigmergeError: another process failed.
    """

    def go_on() -> None:
        if stop.asked:
            raise Interrupted(
                "interrupted",
                hint="the same command goes on from the examples finished so far" if state.saves else None,
            )

    finished = set(progress.finished)
    whole = True
    try:
        for ids in batches:
            if finished.issuperset(ids):
                continue
            go_on()
            notices.check()
            whole = False  # until the batch is added the sums are of no use
            progress.tokens += _add(engine, examples, ids)
            progress.finished.extend(ids)
            whole = True
            bar.update(len(ids))
            if state.due():
                state.save(progress)
        notices.done()
        notices.wait(go_on)
    except Interrupted as error:
        notices.failed(error)
        state.save(progress)
        raise
    except BigmergeError as error:
        notices.failed(error)
        if whole:
            with contextlib.suppress(OutputError):  # the first error is the one to report
                state.save(progress)
        raise
    except Exception as error:
        notices.failed(error)
        raise


def _add(engine: Engine, examples: Examples, ids: Sequence[int]) -> int:
    batch = examples.batch(ids)
    shape = "×".join(map(str, batch.targets.shape))
    with device_memory(f"a batch of {shape} labels beside the model and its sums"):
        return engine.add(batch)
