"""Carries out a plan: what an earlier run has done is taken over, the rest is done here or by several processes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from bigmerge.errors import Interrupted
from bigmerge.merging.measure import Statistics, measure
from bigmerge.merging.parts import split
from bigmerge.merging.plan import Plan
from bigmerge.merging.profile import Profile
from bigmerge.merging.records import StepRecords
from bigmerge.merging.resuming import Earlier, read_journals
from bigmerge.merging.teamwork import Part, do_part, do_parts
from bigmerge.progress import progress_bar
from bigmerge.storage.inputs import InputFiles
from bigmerge.storage.staging import Staging
from bigmerge.storage.writing import CheckpointWriter


@dataclass(frozen=True)
class Prepared:
    """What is known when the steps can begin.

    Attributes:
        earlier: what earlier runs left.
        records: of the steps that need not be done again.
        statistics: what the method must know of whole tensors and models.
        moved: bytes that those steps have read and written.
    """

    earlier: Earlier
    records: StepRecords
    statistics: Statistics
    moved: int

    @property
    def todo(self) -> list[int]:
        """Numbers of the steps that are to be done."""
        numbers: list[int] = np.flatnonzero(~self.records.done).tolist()
        return numbers


def prepare(plan: Plan, staging: Staging, *, show_progress: bool) -> Prepared:
    """Measure what must be measured, create the output's files, and take over what an earlier run did.

    Raises:
        CheckpointError: an input cannot be read.
        OutputError: the output cannot be written.
    """
    earlier = Earlier(plan, staging.scratch)
    records = StepRecords(plan)
    with (
        InputFiles(plan.input_paths(), plan.schedule.io) as files,
        CheckpointWriter(staging.output, plan.layout) as writer,
    ):
        statistics = measure(plan, staging.scratch, files, show_progress=show_progress)
        writer.create()
        moved = earlier.take_over(files, writer, records, show_progress=show_progress)
    return Prepared(earlier, records, statistics, moved)


def execute(plan: Plan, staging: Staging, *, show_progress: bool) -> tuple[StepRecords, Profile]:
    """Do every step of `plan` that an earlier run has not done, and wait until all is on the disk.

    Raises:
        Interrupted: Ctrl-C; what is finished stays and the next run goes on.
        CheckpointError: an input cannot be read, holds what cannot be merged, or has changed meanwhile.
        OutputError: the output cannot be written.
    """
    try:
        prepared = prepare(plan, staging, show_progress=show_progress)
        with progress_bar(
            total=plan.transfer_bytes, unit="B", desc="merging", done=prepared.moved, show=show_progress
        ) as bar:
            show = partial(_show, bar, prepared.moved)
            if plan.schedule.processes == 1:
                part = Part(plan, 0, prepared.todo, staging.scratch, staging.output, prepared.statistics)
                profile = do_part(part, moved=show, stored=prepared.records.add)
            else:
                parts = split(plan, prepared.todo, plan.schedule.processes, whole_files=False)
                profile = do_parts(plan, parts, staging, prepared.statistics, moved=show)
                add_journals(plan, staging, prepared.records)
        prepared.earlier.check_unchanged()
    except Interrupted as stop:
        stop.hint = f"run the same command again to go on; unfinished work is in {staging.scratch}"
        raise
    return prepared.records, profile


def add_journals(plan: Plan, staging: Staging, records: StepRecords) -> None:
    """Add to `records` what other processes have journalled."""
    for entry in read_journals(staging.scratch, plan.step_count).values():
        records.add(entry)


def _show(bar: tqdm[Any], before: int, moved: int) -> None:
    bar.update(before + moved - bar.n)
