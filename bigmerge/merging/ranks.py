"""A merge whose processes a launcher has started (accelerate launch, torchrun), perhaps on several machines.

They share a file system. Rank 0 prepares and publishes; every rank does whole output files and keeps a journal.
The processes talk to agree on what is merged and on errors, and for nothing else.
"""

from __future__ import annotations

import contextlib
import logging

from bigmerge.errors import Interrupted, UsageError
from bigmerge.merging.execution import Prepared, add_journals, prepare
from bigmerge.merging.finishing import finish
from bigmerge.merging.measure import Statistics
from bigmerge.merging.parts import split
from bigmerge.merging.plan import Plan
from bigmerge.merging.profile import Profile
from bigmerge.merging.teamwork import Part, do_part
from bigmerge.processes import Group, Notices
from bigmerge.progress import progress_bar
from bigmerge.storage.staging import Staging

log = logging.getLogger("bigmerge.merge")


def execute_among_ranks(plan: Plan, *, overwrite: bool, show_progress: bool) -> Profile:
    """Do this process's part of `plan`, and return when the output is published.

    Raises:
        UsageError: the processes were not given the same merge.
        BigmergeError: any process's error, on all of them.
        Interrupted: a process was stopped; the same command goes on.
    """
    group = Group(cpu=True)
    try:
        profile = _execute(group, plan, overwrite=overwrite, show_progress=show_progress)
        group.settle()
        return profile
    finally:
        group.close()


def _execute(group: Group, plan: Plan, *, overwrite: bool, show_progress: bool) -> Profile:
    if len(set(group.gather(plan.fingerprint()))) > 1:
        raise UsageError(
            "the processes were not given the same merge",
            hint="start every one with the same arguments and the same version of bigmerge",
        )
    staging = group.together(lambda: Staging(plan.out, plan.recipe.describe(), overwrite=overwrite))
    notices = Notices(staging.scratch / "ranks", group)
    with contextlib.ExitStack() as stack:
        kept: list[Prepared] = []

        def begin() -> tuple[Statistics, list[int]]:
            stack.enter_context(staging)
            notices.clear()
            kept.append(prepare(plan, staging, show_progress=show_progress))
            return kept[0].statistics, kept[0].todo

        statistics, todo = group.from_main(begin)
        parts = split(plan, todo, group.world, whole_files=True)
        if group.is_main and todo and not all(parts):
            idle = sum(not part for part in parts)
            log.warning(
                "%d of %d processes have nothing to do; use a smaller --shard-size", idle, group.world
            )
        part = Part(plan, group.rank, parts[group.rank], staging.scratch, staging.output, statistics)
        profile = group.together(lambda: _do(part, group, notices, show_progress=show_progress))

        def end() -> None:
            add_journals(plan, staging, kept[0].records)
            kept[0].earlier.check_unchanged()
            finish(plan, kept[0].records, staging.output)
            staging.publish()

        group.from_main(end)
    return Profile.total(group.gather(profile))


def _do(part: Part, group: Group, notices: Notices, *, show_progress: bool) -> Profile:
    total = sum(part.plan.step_bytes(part.plan.step(number)) for number in part.steps)
    with progress_bar(
        total=total, unit="B", desc=f"merging, part 1 of {group.world}", show=show_progress and group.is_main
    ) as bar:

        def moved(now: int) -> None:
            bar.update(now - bar.n)
            notices.check()

        try:
            profile = do_part(part, moved=moved)
            notices.done()
            notices.wait(lambda: None)
        except KeyboardInterrupt:
            stop = Interrupted("interrupted", hint="run the same command again to go on")
            notices.failed(stop)
            raise stop from None
        except Exception as error:
            notices.failed(error)
            raise
    return profile
