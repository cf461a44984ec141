"""Several processes of this machine that share the steps of one merge, each with a journal of its own."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from bigmerge.errors import BigmergeError, Interrupted, ResourceError
from bigmerge.merging.engine import run_steps
from bigmerge.merging.measure import Statistics
from bigmerge.merging.plan import Plan
from bigmerge.merging.profile import Profile
from bigmerge.merging.worker import Stores
from bigmerge.processes import describe_error, restore_error
from bigmerge.storage.inputs import InputFiles
from bigmerge.storage.journal import Entry, Journal
from bigmerge.storage.staging import Staging
from bigmerge.storage.writing import CheckpointWriter

_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Part:
    """One process's share of a merge.

    Attributes:
        number: of the part; names its journal.
        steps: what it does.
        scratch, output: where journals and output files are.
    """

    plan: Plan
    number: int
    steps: Sequence[int]
    scratch: Path
    output: Path
    statistics: Statistics


def do_part(
    part: Part, *, moved: Callable[[int], None], stored: Callable[[Entry], None] | None = None
) -> Profile:
    """Do a part in this process, with files of its own; the output's files have been created.

    Raises:
        BigmergeError: see `run_steps`.
    """
    with (
        InputFiles(part.plan.input_paths(), part.plan.schedule.io) as files,
        CheckpointWriter(part.output, part.plan.layout, direct=part.plan.schedule.direct_output) as writer,
        Journal(part.scratch / f"journal-{part.number}") as journal,
    ):
        writer.open()
        return run_steps(
            part.plan,
            part.steps,
            Stores(files, writer, journal),
            part.statistics,
            stored=stored or _nothing,
            moved=moved,
        )


def _nothing(entry: Entry) -> None:
    """Whoever put the processes to work reads the journals when they have ended."""
    del entry


def do_parts(
    plan: Plan,
    parts: Sequence[Sequence[int]],
    staging: Staging,
    statistics: Statistics,
    *,
    moved: Callable[[int], None],
) -> Profile:
    """Do every part in a process of its own and wait for all of them.

    Raises:
        BigmergeError: the first error of any process; the others were stopped and what they did is kept.
        Interrupted: Ctrl-C.
    """
    context: Any = multiprocessing.get_context(_start_method(plan))
    counters = context.RawArray("q", len(parts))
    team: list[tuple[Any, Any]] = []
    told: dict[int, Any] = {}
    interrupted = False
    for number, steps in enumerate(parts):
        part = Part(plan, number, steps, staging.scratch, staging.output, statistics)
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_run_part, args=(part, counters, sender, os.getpid()), name=f"bigmerge-part-{number}"
        )
        with warnings.catch_warnings():
            # Forking beside other threads is warned of; the method was chosen with that in mind.
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        sender.close()
        team.append((process, receiver))
    while len(told) < len(team):
        try:
            waiting = [process.sentinel for number, (process, _) in enumerate(team) if number not in told]
            connection.wait(waiting, timeout=_POLL_SECONDS)
            moved(sum(counters))
            for number, (process, receiver) in enumerate(team):
                if number not in told and not process.is_alive():
                    told[number] = _result(number, process, receiver)
            if any(isinstance(result, BigmergeError) for result in told.values()):
                _stop(team)
        except KeyboardInterrupt:
            interrupted = True
            _stop(team)
    failures = [result for result in told.values() if isinstance(result, BigmergeError)]
    for failure in sorted(failures, key=lambda failure: isinstance(failure, Interrupted)):
        raise failure
    if interrupted and not told:
        raise Interrupted("interrupted")
    return Profile.total(told[number] for number in sorted(told))


def _start_method(plan: Plan) -> str:
    """Forked processes start at once, but only a process without threads and GPUs may be forked."""
    others = [thread for thread in threading.enumerate() if type(thread).__name__ != "TMonitor"]  # tqdm's
    plain = len(others) == 1 and plan.schedule.device == "cpu" and not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return "fork" if plain else "spawn"


def _stop(team: Sequence[tuple[Any, Any]]) -> None:
    for process, _ in team:
        if process.is_alive():
            process.terminate()


def _result(number: int, process: Any, receiver: Any) -> Profile | BigmergeError:
    """What an ended process has reported."""
    process.join()
    with contextlib.suppress(EOFError, OSError):
        if receiver.poll():
            kind, value = receiver.recv()
            result: Profile | BigmergeError = value if kind == "done" else restore_error(value)
            return result
    if process.exitcode is not None and process.exitcode < 0:
        name = signal.Signals(-process.exitcode).name
        return ResourceError(
            f"process {number} of the merge was killed ({name})",
            hint="often memory has run out: use fewer --processes or a smaller --memory; the same command goes on",
            process=number,
            signal=name,
        )
    return BigmergeError(f"process {number} of the merge ended with exit code {process.exitcode}")


def _run_part(part: Part, counters: Any, sender: Any, parent: int) -> None:
    """The main function of a process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM, 0, 0, 0)
    try:
        if os.getppid() != parent:
            raise KeyboardInterrupt
        profile = do_part(part, moved=lambda now: counters.__setitem__(part.number, now))
        sender.send(("done", profile))
    except KeyboardInterrupt:
        sender.send(("error", describe_error(Interrupted("interrupted"))))
    except Exception as error:
        sender.send(("error", describe_error(error)))
    finally:
        sender.close()
