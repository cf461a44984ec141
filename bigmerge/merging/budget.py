"""What a run may use, and how it is laid out within that: workers, buffers, ways of reading."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from bigmerge.checkpoints.dtypes import byte_count
from bigmerge.errors import ResourceError
from bigmerge.merging import grid
from bigmerge.merging.alignment import Kept, Merged
from bigmerge.merging.recipe import Recipe
from bigmerge.quantities import format_bytes
from bigmerge.storage.mapping import FOLIO
from bigmerge.storage.reading import IO, buffer_bytes

DEFAULT_MEMORY = 256 << 20
_MOST_WORKERS = 16
#: what a run holds besides blocks and windows: threads, library code touched first, journal, progress
_FIXED_BYTES = 32 << 20
_PER_SPEC_BYTES = 400  # one tensor of one input: its description and its places in tables
_PER_STEP_BYTES = 48
#: windows that are on their way to and from a device at the same time, for each worker
_STAGED_DEPTH = 3


@dataclass(frozen=True)
class Budget:
    """What a run may use.

    Attributes:
        memory: bytes of working memory of each process, beyond the interpreter and torch.
        workers: most threads of each process; None: the cores, divided among the processes. Fewer are used if
            memory is short.
        io: how inputs are read; None: "mmap", or "pread" where that lets more workers fit into `memory` or
            the arithmetic is done on another device.
        device: where the arithmetic is done, as torch names it.
        processes: how many processes share the work on this machine.
    """

    memory: int = DEFAULT_MEMORY
    workers: int | None = None
    io: IO | None = None
    device: str = "cpu"
    processes: int = 1


@dataclass(frozen=True)
class Schedule:
    """How a run is carried out. Nothing here changes the result.

    Attributes:
        workers: threads of each process.
        block: elements that are read, computed and written at a time.
        processes: processes on this machine.
        io: how inputs are read.
        device: where the arithmetic is done.
        depth: windows that each worker has under way on the device behind the one that it is reading.
        sets: sets of buffers of each worker; a set holds one window of every input of a tensor.
        slots: buffers of a set.
        window_bytes: bytes of the largest window.
        peak_bytes: working memory that no process will exceed.
    """

    workers: int
    block: int
    processes: int
    io: IO
    device: str
    depth: int
    sets: int
    slots: int
    window_bytes: int
    peak_bytes: int


def fit(
    recipe: Recipe, tensors: Sequence[Merged | Kept], dtypes: Sequence[str], steps: int, budget: Budget
) -> Schedule:
    """The schedule with the most workers, and the largest blocks, that keeps `budget`.

    Args:
        recipe: the merge.
        tensors, dtypes: every output tensor and its dtype.
        steps: steps of the whole merge.

    Raises:
        ResourceError: not even one worker fits.
    """
    specs = sum(len(entry.inputs) for entry in tensors)
    fixed = _FIXED_BYTES + _PER_SPEC_BYTES * specs + _PER_STEP_BYTES * steps
    most = budget.workers or min(max(1, len(os.sched_getaffinity(0)) // budget.processes), _MOST_WORKERS)
    staged = budget.device != "cpu"
    if budget.io is not None:
        kinds: tuple[IO, ...] = (budget.io,)
    else:
        kinds = ("pread",) if staged else ("mmap", "pread")
    depth = _STAGED_DEPTH if staged else 0
    schedules = []
    for io in kinds:
        for block in grid.BLOCKS:
            sets = (
                1 + depth + (io == "direct")
            )  # direct reads go on in the background, into a set of their own
            cost, slots, window_bytes = _of_one_worker(recipe, tensors, dtypes, io, block, sets, depth)
            workers = min(most, max(1, (budget.memory - fixed) // cost))
            peak = fixed + workers * cost
            schedules.append(
                Schedule(
                    workers,
                    block,
                    budget.processes,
                    io,
                    budget.device,
                    depth,
                    sets,
                    slots,
                    window_bytes,
                    peak,
                )
            )
    fitting = [schedule for schedule in schedules if schedule.peak_bytes <= budget.memory]
    if fitting:
        return max(fitting, key=lambda schedule: (schedule.workers, schedule.block))  # of equals the first
    least = min(schedule.peak_bytes for schedule in schedules)
    raise ResourceError(
        f"this merge needs at least {format_bytes(least)} of working memory, the budget is "
        f"{format_bytes(budget.memory)}",
        hint=f"--memory {-(-least // (1 << 20))}MiB",
        needed=least,
        budget=budget.memory,
    )


def _of_one_worker(
    recipe: Recipe,
    tensors: Sequence[Merged | Kept],
    dtypes: Sequence[str],
    io: IO,
    block: int,
    sets: int,
    depth: int,
) -> tuple[int, int, int]:
    """(bytes, slots, bytes of the largest window) of one worker."""
    slots = window_bytes = most = 0
    for entry, dtype in zip(tensors, dtypes, strict=True):
        inputs = entry.inputs
        count = min(block, inputs[0].numel)
        windows = [byte_count(spec.dtype, count) for spec in inputs]
        slots = max(slots, len(inputs))
        window_bytes = max(window_bytes, *windows)
        # Reading a page maps the large folio around it.
        mapped = sum(-(-window // FOLIO) + 1 for window in windows) * FOLIO if io == "mmap" else 0
        written = byte_count(dtype, count) * (1 + depth)
        scratch = 0
        if isinstance(entry, Merged):
            width = 8 if entry.compute_dtype == "F64" else 4
            # One more for the base, and a block of masks and rounding aids.
            scratch = (recipe.method.buffers(len(recipe.sources)) + 2) * count * width
        most = max(most, mapped + written + scratch)
    return most + sets * slots * buffer_bytes(window_bytes, io), slots, window_bytes
