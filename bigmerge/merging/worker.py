"""What one thread of a merge does: reads windows, has them merged, writes the result, and says which steps are done.

Waiting for the disk is left to helpers wherever a transfer takes no processor time, past the page cache: the next
windows are read, and the last ones written, while the arithmetic goes on.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import xxhash

from bigmerge.checkpoints.dtypes import byte_count
from bigmerge.merging.arithmetic import Arithmetic, HostArithmetic
from bigmerge.merging.measure import Statistics
from bigmerge.merging.plan import Plan, Step
from bigmerge.merging.profile import Stopwatch
from bigmerge.merging.staged import StagedArithmetic
from bigmerge.merging.windows import Window, WindowReader
from bigmerge.storage.inputs import InputFiles
from bigmerge.storage.journal import Entry, Journal
from bigmerge.storage.writing import CheckpointWriter

#: bytes of input that each worker has the kernel read in advance
_AHEAD_BYTES = 8 << 20
#: windows that each worker has read at the same time past the page cache
_READERS = 4

T = TypeVar("T")


@dataclass(frozen=True)
class Stores:
    """Where a run reads, writes and keeps its journal."""

    files: InputFiles
    writer: CheckpointWriter
    journal: Journal


class Shared:
    """What the threads of one run share.

    Args:
        steps: what is to be done.
        commit_bytes: how much finished output may wait to be recorded before `wake` is set.

    Attributes:
        stop: set when the run is to end.
        wake: set when finished steps should be recorded.
        moved: bytes read and written so far.
    """

    def __init__(self, steps: Iterator[Step], *, commit_bytes: int) -> None:
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.wake = threading.Event()
        self.moved = 0
        self._steps = steps
        self._commit_bytes = commit_bytes
        self._finished: list[Entry] = []
        self._finished_bytes = 0

    def next_step(self) -> Step | None:
        """A step that nobody has taken; None when there is none or the run is to stop."""
        with self.lock:
            return None if self.stop.is_set() else next(self._steps, None)

    def count(self, nbytes: int) -> None:
        """So many bytes were read or written."""
        with self.lock:
            self.moved += nbytes

    def finished(self, entry: Entry, nbytes: int) -> None:
        """A step's `nbytes` bytes are written; they are to be waited for and recorded."""
        with self.lock:
            self._finished.append(entry)
            self._finished_bytes += nbytes
            full = self._finished_bytes >= self._commit_bytes
        if full:
            self.wake.set()

    def take_finished(self) -> list[Entry]:
        """The steps that were finished since the last call."""
        with self.lock:
            entries, self._finished, self._finished_bytes = self._finished, [], 0
        return entries


class _Progress:
    """One step on its way: digests of what was read and written so far, and whether a write has failed."""

    def __init__(self, step: Step, inputs: int) -> None:
        self.step = step
        self.failed = False
        self.output = xxhash.xxh3_128()
        self.inputs = [xxhash.xxh3_64() for _ in range(inputs)]

    def entry(self) -> Entry:
        """What the journal records of it."""
        return Entry(self.step.number, self.output.digest(), tuple(digest.digest() for digest in self.inputs))


@dataclass(frozen=True)
class _Piece:
    """One window of a step: `count` elements from element `first` of its tensor."""

    progress: _Progress
    first: int
    count: int
    last: bool


class Worker:
    """One thread's own buffers, arithmetic and stopwatch. To be used once."""

    def __init__(self, plan: Plan, stores: Stores, statistics: Statistics, shared: Shared) -> None:
        self.plan = plan
        self.shared = shared
        self.writer = stores.writer
        schedule = plan.schedule
        device = torch.device(schedule.device)
        self.reader = WindowReader(stores.files, schedule.slots * schedule.sets, pinned=device.type == "cuda")
        self.arithmetic: Arithmetic = (
            HostArithmetic(plan, statistics)
            if device.type == "cpu" and not schedule.depth
            else StagedArithmetic(plan, statistics, device)
        )
        beside = {"read": schedule.io == "direct", "write": schedule.direct_output}
        self.watch = Stopwatch(beside=[stage for stage, so in beside.items() if so])

    def run(self) -> None:
        """Do steps until none is left."""
        schedule = self.plan.schedule
        under_way: deque[tuple[_Piece, list[Window], Callable[[], memoryview]]] = deque()
        writes: deque[Callable[[], None]] = deque()
        with (
            _Helpers("bigmerge-read", _READERS if schedule.io == "direct" else 0) as reader,
            _Helpers("bigmerge-write", int(schedule.direct_output)) as writer,
        ):
            for number, (piece, windows) in enumerate(self._windows(reader)):
                self.watch.lap("read", sum(len(window.raw) for window in windows))
                for window, digest in zip(windows, piece.progress.inputs, strict=True):
                    digest.update(window.raw)
                self.watch.lap("digest", sum(len(window.raw) for window in windows))
                while len(under_way) + len(writes) >= schedule.outputs:
                    writes.popleft()()
                self.watch.lap("write")
                finish = self.arithmetic.start(piece.progress.step.tensor, windows, number)
                self.watch.lap("compute", sum(len(window.raw) for window in windows))
                under_way.append((piece, windows, finish))
                if len(under_way) > schedule.depth:
                    writes.append(writer.submit(self._finish(*under_way.popleft())))
                    self.watch.lap("write")
            while under_way:
                writes.append(writer.submit(self._finish(*under_way.popleft())))
            for wait in writes:
                wait()
            self.watch.lap("write")

    def _finish(
        self, piece: _Piece, windows: list[Window], finish: Callable[[], memoryview]
    ) -> Callable[[], None]:
        """Wait for the arithmetic on a piece; returns what is left to do, writing it."""
        data = finish()
        self.watch.lap("compute")
        for window in windows:
            self.reader.release(window)
        self.watch.lap("read")
        piece.progress.output.update(data)
        self.watch.lap("digest", len(data))
        self.watch.profile.moved["write"] += len(data)
        return partial(self._write, piece, data, sum(len(window.raw) for window in windows))

    def _write(self, piece: _Piece, data: memoryview, read: int) -> None:
        """Write a piece of the output; after a step's last, the step is finished."""
        step = piece.progress.step
        name, dtype = self.plan.tensors[step.tensor].name, self.plan.dtypes[step.tensor]
        try:
            self.writer.write(name, byte_count(dtype, piece.first), data)
        except BaseException:
            piece.progress.failed = True  # a later piece of the step may still be written
            raise
        self.shared.count(len(data) + read)
        if piece.last and not piece.progress.failed:
            self.shared.finished(piece.progress.entry(), byte_count(dtype, step.count))

    # -- reading ---------------------------------------------------------------------------------------------

    def _windows(self, helpers: _Helpers) -> Iterator[tuple[_Piece, list[Window]]]:
        """Every piece of the steps that this worker takes, with its windows, which `helpers` bring into memory."""
        sets = self.plan.schedule.sets
        ahead = sets - 1 - self.plan.schedule.depth  # sets that are read into while the others are worked on
        coming: deque[tuple[_Piece, list[Callable[[], Window]]]] = deque()
        for number, piece in enumerate(self._pieces()):
            first_slot = number % sets * len(self.plan.schedule.slots)
            specs = self.plan.inputs(piece.progress.step.tensor)
            windows = [
                helpers.submit(partial(self.reader.read, slot, spec, piece.first, piece.count))
                for slot, spec in enumerate(specs, start=first_slot)
            ]
            coming.append((piece, windows))
            if len(coming) > ahead:
                first, windows = coming.popleft()
                yield first, [window() for window in windows]
        for first, windows in coming:
            yield first, [window() for window in windows]

    def _pieces(self) -> Iterator[_Piece]:
        for step in self._steps():
            progress = _Progress(step, len(self.plan.inputs(step.tensor)))
            end = step.start + step.count
            window = self.plan.schedule.window
            for first in range(step.start, end, window):
                if self.shared.stop.is_set():
                    return
                count = min(window, end - first)
                yield _Piece(progress, first, count, last=first + count == end)

    def _steps(self) -> Iterator[Step]:
        """Steps for this worker, each after the kernel was asked to read those that come next."""
        ahead: deque[Step] = deque()
        ahead_bytes = 0
        while True:
            while ahead_bytes < _AHEAD_BYTES and (step := self.shared.next_step()) is not None:
                for spec in self.plan.inputs(step.tensor):
                    self.reader.read_ahead(spec, step.start, step.count)
                ahead.append(step)
                ahead_bytes += self.plan.step_bytes(step)
            if not ahead:
                return
            step = ahead.popleft()
            ahead_bytes -= self.plan.step_bytes(step)
            yield step


class _Helpers:
    """Threads that take one thing after another; if there are none, things are done where they are submitted."""

    def __init__(self, name: str, count: int) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=name) if count else None

    def submit(self, work: Callable[[], T]) -> Callable[[], T]:
        """Have `work` done; what is returned waits for its result, or raises its error."""
        if self._pool is None:
            result = work()
            return lambda: result
        return self._pool.submit(work).result

    def __enter__(self) -> _Helpers:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
