"""What a run may use, and how it is laid out within that: workers, buffers, ways of reading."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bigmerge.checkpoints.dtypes import byte_count
from bigmerge.errors import ResourceError
from bigmerge.merging import grid
from bigmerge.merging.alignment import Kept, Merged
from bigmerge.merging.recipe import Recipe
from bigmerge.quantities import format_bytes
from bigmerge.storage.buffers import ALIGNMENT, allocated_bytes
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
        io: how inputs are read; None: see `fit`.
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
        window: elements that are read and written at a time: whole blocks.
        block: elements that are computed at a time.
        processes: processes on this machine.
        io: how inputs are read.
        direct_output: whether the output is written past the page cache.
        device: where the arithmetic is done.
        depth: windows that each worker has under way on the device behind the one that it is reading.
        sets: sets of buffers of each worker; a set holds one window of every input of a tensor.
        slots: bytes of the largest window of each input, for each of which a set has a buffer.
        outputs: buffers of each worker for windows of the output.
        output_bytes: bytes of each of those, with room to lie as in the file.
        peak_bytes: working memory that no process will exceed.
    """

    workers: int
    window: int
    block: int
    processes: int
    io: IO
    direct_output: bool
    device: str
    depth: int
    sets: int
    slots: tuple[int, ...]
    outputs: int
    output_bytes: int
    peak_bytes: int


def fit(
    recipe: Recipe,
    tensors: Sequence[Merged | Kept],
    dtypes: Sequence[str],
    steps: int,
    budget: Budget,
    *,
    cold: bool,
    local_output: bool,
) -> Schedule:
    """The schedule with the most workers, and the largest windows and blocks, that keeps `budget`.

    If the budget leaves the way of reading open, it is "pread" where the arithmetic is done on another device;
    else "direct" for `cold` inputs, or "mmap", and "pread" where that lets more workers fit.

    Args:
        recipe: the merge.
        tensors, dtypes: every output tensor and its dtype.
        steps: steps of the whole merge.
        cold: whether the inputs are to be read from a local disk rather than found in the page cache.
        local_output: whether the output goes to a local disk.

    Raises:
        ResourceError: not even one worker fits.
    """
    specs = sum(len(entry.inputs) for entry in tensors)
    fixed = _FIXED_BYTES + _PER_SPEC_BYTES * specs + _PER_STEP_BYTES * steps
    most = budget.workers or min(max(1, len(os.sched_getaffinity(0)) // budget.processes), _MOST_WORKERS)
    schedules: list[Schedule] = []
    for io, window, block in _choices(budget, cold=cold):
        depth = _STAGED_DEPTH if budget.device != "cpu" else 0
        sets = 1 + depth + (io == "direct")  # direct reads go on in the background, into a set of their own
        slots = _slots(tensors, window)
        direct_output = local_output or budget.io == "direct"
        outputs = 1 + depth + direct_output  # one is written while the next is made
        output_bytes = _output_bytes(tensors, dtypes, window)
        buffers = [buffer_bytes(nbytes, io) for nbytes in slots] * sets
        if depth:  # pinned memory comes in powers of two; the host has buffers for what is only copied
            pinned = [*buffers, *[output_bytes] * outputs]
            cost = sum(1 << (nbytes - 1).bit_length() for nbytes in pinned if nbytes)
            cost += allocated_bytes([output_bytes] * outputs)
        else:
            cost = allocated_bytes(buffers) + allocated_bytes([output_bytes] * outputs)
        cost += _mapped_bytes(tensors, window) if io == "mmap" else 0
        cost += _scratch_bytes(recipe, tensors, block)
        workers = min(most, max(1, (budget.memory - fixed) // cost))
        schedules.append(
            Schedule(
                workers=workers,
                window=window,
                block=block,
                processes=budget.processes,
                io=io,
                direct_output=direct_output,
                device=budget.device,
                depth=depth,
                sets=sets,
                slots=slots,
                outputs=outputs,
                output_bytes=output_bytes,
                peak_bytes=fixed + workers * cost,
            )
        )
    fitting = [schedule for schedule in schedules if schedule.peak_bytes <= budget.memory]
    if fitting:  # of equals the first
        return max(fitting, key=lambda schedule: _rank(schedule, cold=cold))
    least = min(schedule.peak_bytes for schedule in schedules)
    raise ResourceError(
        f"this merge needs at least {format_bytes(least)} of working memory, the budget is "
        f"{format_bytes(budget.memory)}",
        hint=f"--memory {-(-least // (1 << 20))}MiB",
        needed=least,
        budget=budget.memory,
    )


def _rank(schedule: Schedule, *, cold: bool) -> tuple[int, bool, int, int]:
    """What is better, in falling order of importance."""
    if schedule.io == "direct":  # the length of requests decides
        return schedule.workers, cold, schedule.window, schedule.block
    return schedule.workers, False, schedule.block, schedule.window


def _choices(budget: Budget, *, cold: bool) -> Iterator[tuple[IO, int, int]]:
    """Ways of reading, window and block that may be used; preferred ways first."""
    kinds: tuple[IO, ...] = ("direct", "mmap", "pread") if cold else ("mmap", "pread")
    if budget.io is not None:
        kinds = (budget.io,)
    elif budget.device != "cpu":
        kinds = ("pread",)
    for io in kinds:
        for block in grid.BLOCKS:
            windows = {grid.STEP, block}
            if io == "direct":
                windows = {*grid.DIRECT_WINDOWS}
                if budget.io is not None:  # as it is asked for: slow, but in any memory
                    windows.add(block)
            if budget.device != "cpu":
                windows = {block}
            yield from ((io, window, block) for window in sorted(windows) if window >= block)


def _slots(tensors: Sequence[Merged | Kept], window: int) -> tuple[int, ...]:
    """Bytes of the largest window of the first, second, ... input of any tensor."""
    slots: list[int] = []
    for entry in tensors:
        inputs = entry.inputs
        slots += [0] * (len(inputs) - len(slots))
        for place, spec in enumerate(inputs):
            slots[place] = max(slots[place], byte_count(spec.dtype, min(window, spec.numel)))
    return tuple(slots)


def _mapped_bytes(tensors: Sequence[Merged | Kept], window: int) -> int:
    """Bytes of mapped files that one worker has in memory: reading a page maps the large folio around it."""
    return max(
        (
            sum(-(-byte_count(spec.dtype, min(window, spec.numel)) // FOLIO) + 1 for spec in entry.inputs)
            for entry in tensors
        ),
        default=0,
    ) * FOLIO  # fmt: skip


def _scratch_bytes(recipe: Recipe, tensors: Sequence[Merged | Kept], block: int) -> int:
    """Bytes of one worker's scratch buffers."""
    # One more for the base, and a block of masks and rounding aids.
    buffers = recipe.method.buffers(len(recipe.sources)) + 2
    widths = (
        (8 if entry.compute_dtype == "F64" else 4) * min(block, entry.inputs[0].numel)
        for entry in tensors
        if isinstance(entry, Merged)
    )
    return buffers * max(widths, default=0)


def _output_bytes(tensors: Sequence[Merged | Kept], dtypes: Sequence[str], window: int) -> int:
    """Bytes of a buffer for windows of the output."""
    sizes = (
        byte_count(dtype, min(window, entry.inputs[0].numel))
        for entry, dtype in zip(tensors, dtypes, strict=True)
    )
    return max(sizes, default=0) + ALIGNMENT
