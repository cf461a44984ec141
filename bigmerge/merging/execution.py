"""Carries out a plan, in this process or in several: prepare, do every step that is left, gather the records."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from bigmerge.errors import Interrupted
from bigmerge.merging.engine import Stores, run_steps
from bigmerge.merging.measure import measure
from bigmerge.merging.plan import Plan
from bigmerge.merging.profile import Profile
from bigmerge.merging.records import StepRecords
from bigmerge.merging.resuming import replay
from bigmerge.progress import progress_bar
from bigmerge.storage.inputs import InputFiles
from bigmerge.storage.journal import Journal
from bigmerge.storage.staging import Staging
from bigmerge.storage.writing import CheckpointWriter


def execute(plan: Plan, staging: Staging, *, show_progress: bool) -> tuple[StepRecords, Profile]:
    """Do every step of `plan` that an earlier run has not done, and wait until all is on the disk.

    Raises:
        Interrupted: Ctrl-C; what is finished stays and the next run goes on.
        CheckpointError: an input cannot be read or holds what cannot be merged.
        OutputError: the output cannot be written.
    """
    records = StepRecords(plan)
    try:
        with open_inputs(plan) as files:
            statistics = measure(plan, staging.scratch, files, show_progress=show_progress)
            with CheckpointWriter(staging.output, plan.layout) as writer:
                writer.create()
                with Journal(staging.scratch / "journal") as journal:
                    moved = replay(
                        plan, journal, writer, files, records, staging.scratch, show_progress=show_progress
                    )
                    todo = np.flatnonzero(~records.done).tolist()
                    with progress_bar(
                        total=plan.transfer_bytes, unit="B", desc="merging", done=moved, show=show_progress
                    ) as bar:
                        profile = run_steps(
                            plan,
                            todo,
                            Stores(files, writer, journal),
                            statistics,
                            stored=records.add,
                            moved=partial(_show, bar, moved),
                        )
    except Interrupted as stop:
        stop.hint = f"run the same command again to go on; unfinished work is in {staging.scratch}"
        raise
    return records, profile


def _show(bar: tqdm[Any], before: int, moved: int) -> None:
    bar.update(before + moved - bar.n)


def open_inputs(plan: Plan) -> InputFiles:
    """Every file that the plan reads."""
    paths = (spec.path for number in range(len(plan.tensors)) for spec in plan.inputs(number))
    return InputFiles(paths, plan.schedule.io)
