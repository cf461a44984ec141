"""Does steps of a plan: reads windows, merges them, writes, and keeps a journal of what is safely stored.

Worker threads take steps in output order. One more thread waits for data to reach the disk and then records the
finished steps, so that workers never wait for the disk's flush. Whatever happens to the process, the journal
never claims what is not stored.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
import xxhash

from bigmerge.checkpoints.dtypes import byte_count
from bigmerge.errors import Interrupted
from bigmerge.merging.arithmetic import Arithmetic, HostArithmetic
from bigmerge.merging.measure import Statistics
from bigmerge.merging.plan import Plan, Step
from bigmerge.merging.profile import Profile, Stopwatch
from bigmerge.merging.staged import StagedArithmetic
from bigmerge.merging.windows import Window, WindowReader
from bigmerge.storage.inputs import InputFiles
from bigmerge.storage.journal import Entry, Journal
from bigmerge.storage.writing import CheckpointWriter

#: how much written data may wait for its journal entries, and how long
_COMMIT_BYTES = 256 << 20
_COMMIT_SECONDS = 2.0
#: bytes of input that each worker has the kernel read in advance
_AHEAD_BYTES = 8 << 20
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Stores:
    """Where a run reads, writes and keeps its journal."""

    files: InputFiles
    writer: CheckpointWriter
    journal: Journal


def run_steps(
    plan: Plan,
    steps: Iterable[int],
    stores: Stores,
    statistics: Statistics,
    *,
    stored: Callable[[Entry], None],
    moved: Callable[[int], None],
) -> Profile:
    """Do the steps with the numbers `steps`, and wait until all are on the disk and in the journal.

    Args:
        plan: the merge.
        steps: what to do, in this order.
        stores: files, open.
        statistics: what the method must know of whole tensors and models.
        stored: called for every step that is on the disk.
        moved: called now and then with the bytes read and written so far; what it raises ends the run.

    Raises:
        Interrupted: Ctrl-C; what is finished stays and the next run goes on.
        CheckpointError: an input cannot be read or holds what cannot be merged.
        OutputError: the output cannot be written.
    """
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)  # the workers are the parallelism
    try:
        return _Run(plan, steps, stores, statistics, stored).run(moved)
    finally:
        torch.set_num_threads(threads_before)


class _Progress:
    """One step on its way: digests of what was read and written so far."""

    def __init__(self, step: Step, inputs: int) -> None:
        self.step = step
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


class _Run:
    """The threads of one run and what they share."""

    def __init__(
        self,
        plan: Plan,
        steps: Iterable[int],
        stores: Stores,
        statistics: Statistics,
        stored: Callable[[Entry], None],
    ) -> None:
        self.plan = plan
        self.stores = stores
        self.statistics = statistics
        self.stored = stored
        numbers = list(steps)
        self.steps = map(plan.step, numbers)
        self.step_count = len(numbers)
        self.stored_count = 0
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.wake = threading.Event()
        self.workers_done = False
        self.failure: BaseException | None = None
        self.moved = 0  # bytes read and written, for progress
        self.pending: list[Entry] = []
        self.pending_bytes = 0
        self.profiles: list[Profile] = []

    # -- the main thread -------------------------------------------------------------------------------------

    def run(self, moved: Callable[[int], None]) -> Profile:
        """Start the threads, tell of progress, and see every one of them end."""
        workers = [
            threading.Thread(target=self._guard, args=(self._work,), name=f"bigmerge-{number}", daemon=True)
            for number in range(self.plan.schedule.workers)
        ]
        committer = threading.Thread(
            target=self._guard, args=(self._commit,), name="bigmerge-commit", daemon=True
        )
        watch = Stopwatch()
        interrupted = ended = False
        while not ended:
            # Ctrl-C may come anywhere in here; the files must stay open until every thread has ended.
            try:
                self._see_to_end(workers, committer, watch, moved)
                ended = True
            except KeyboardInterrupt:
                interrupted = True
                self.stop.set()
            except Exception as error:  # of `moved`
                self.failure = self.failure or error
                self.stop.set()
        if self.failure is not None:
            raise self.failure
        if interrupted and self.stored_count < self.step_count:
            raise Interrupted(
                f"interrupted with {self.step_count - self.stored_count} of {self.plan.step_count} steps to do",
                steps=self.plan.step_count,
                left=self.step_count - self.stored_count,
            )
        profile = Profile.total(self.profiles)
        profile.seconds["wait"] = watch.profile.seconds["wait"]
        return profile

    def _see_to_end(
        self,
        workers: list[threading.Thread],
        committer: threading.Thread,
        watch: Stopwatch,
        moved: Callable[[int], None],
    ) -> None:
        """Start what has not been started, and wait for all of it. Can be called again after an interruption."""
        for thread in (committer, *workers):
            if thread.ident is None and not (self.stop.is_set() and thread is not committer):
                thread.start()
        for thread in workers:
            while thread.is_alive():
                thread.join(_POLL_SECONDS)
                if not self.stop.is_set():
                    moved(self.moved)
        watch.lap("read")  # nobody asks for it: the workers keep their own time
        while committer.is_alive():
            self.workers_done = True
            self.wake.set()
            committer.join(_POLL_SECONDS)
        watch.lap("wait")
        if not self.stop.is_set():
            moved(self.moved)

    def _guard(self, work: Callable[[], None]) -> None:
        """Run a thread's work; the first failure stops all threads and is raised by the main thread."""
        try:
            work()
        except BaseException as error:
            with self.lock:
                self.failure = self.failure or error
            self.stop.set()

    # -- workers ---------------------------------------------------------------------------------------------

    def _work(self) -> None:
        torch.set_num_threads(1)
        worker = _Worker(self)
        try:
            worker.run()
        finally:
            with self.lock:
                self.profiles.append(worker.watch.profile)

    def next_step(self) -> Step | None:
        """A step that nobody has taken; None when there is none or the run is to stop."""
        with self.lock:
            return None if self.stop.is_set() else next(self.steps, None)

    def finished(self, entry: Entry, nbytes: int) -> None:
        """A step's `nbytes` bytes are written; they are to be waited for and recorded."""
        with self.lock:
            self.pending.append(entry)
            self.pending_bytes += nbytes
            full = self.pending_bytes >= _COMMIT_BYTES
        if full:
            self.wake.set()

    # -- the committer ---------------------------------------------------------------------------------------

    def _commit(self) -> None:
        last = False
        while not last:
            self.wake.wait(_COMMIT_SECONDS)
            self.wake.clear()
            last = self.workers_done
            with self.lock:
                entries, self.pending, self.pending_bytes = self.pending, [], 0
            if entries:
                numbers = {self.plan.step(entry.number).tensor for entry in entries}
                self.stores.writer.sync(self.plan.tensors[number].name for number in numbers)
                self.stores.journal.append(entries)
                for entry in entries:
                    self.stored(entry)
                self.stored_count += len(entries)


class _Worker:
    """What one worker thread has of its own: buffers, arithmetic, and a stopwatch."""

    def __init__(self, run: _Run) -> None:
        self.run_ = run
        self.plan = plan = run.plan
        self.writer = run.stores.writer
        schedule = plan.schedule
        device = torch.device(schedule.device)
        self.reader = WindowReader(
            run.stores.files,
            slots=schedule.slots * schedule.sets,
            window_bytes=schedule.window_bytes,
            pinned=device.type == "cuda",
        )
        self.arithmetic: Arithmetic = (
            HostArithmetic(plan, run.statistics)
            if device.type == "cpu" and not schedule.depth
            else StagedArithmetic(plan, run.statistics, device)
        )
        self.watch = Stopwatch()

    def run(self) -> None:
        """Do steps until none is left."""
        schedule = self.plan.schedule
        under_way: deque[tuple[_Piece, list[Window], Callable[[], memoryview]]] = deque()
        background = schedule.io == "direct"
        for number, (piece, windows) in enumerate(self._windows(background=background)):
            self.watch.lap("read", sum(len(window.raw) for window in windows))
            for window, digest in zip(windows, piece.progress.inputs, strict=True):
                digest.update(window.raw)
            self.watch.lap("digest", sum(len(window.raw) for window in windows))
            finish = self.arithmetic.start(piece.progress.step.tensor, windows, number % schedule.sets)
            self.watch.lap("compute", sum(len(window.raw) for window in windows))
            under_way.append((piece, windows, finish))
            if len(under_way) > schedule.depth:
                self._finish(*under_way.popleft())
        while under_way:
            self._finish(*under_way.popleft())

    def _finish(self, piece: _Piece, windows: list[Window], finish: Callable[[], memoryview]) -> None:
        """Write one window of the output; after a step's last, hand it to the committer."""
        data = finish()
        self.watch.lap("compute")
        for window in windows:
            self.reader.release(window)
        self.watch.lap("read")
        piece.progress.output.update(data)
        self.watch.lap("digest", len(data))
        step = piece.progress.step
        name, dtype = self.plan.tensors[step.tensor].name, self.plan.dtypes[step.tensor]
        self.writer.write(name, byte_count(dtype, piece.first), data)
        self.watch.lap("write", len(data))
        with self.run_.lock:
            self.run_.moved += len(data) + sum(len(window.raw) for window in windows)
        if piece.last:
            self.run_.finished(piece.progress.entry(), byte_count(dtype, step.count))

    # -- reading ---------------------------------------------------------------------------------------------

    def _windows(self, *, background: bool) -> Iterator[tuple[_Piece, list[Window]]]:
        """Every piece of the steps that this worker takes, with its windows in memory.

        In the background the next windows are read while the caller works on those before.
        """
        sets = self.plan.schedule.sets
        if not background:
            for turn, piece in enumerate(self._pieces()):
                yield piece, self._read(piece, turn % sets)
            return
        with ThreadPoolExecutor(1, thread_name_prefix="bigmerge-read") as pool:
            coming: deque[tuple[_Piece, Future[list[Window]]]] = deque()
            for turn, piece in enumerate(self._pieces()):
                coming.append((piece, pool.submit(self._read, piece, turn % sets)))
                if turn:
                    first, windows = coming.popleft()
                    yield first, windows.result()
            for first, windows in coming:
                yield first, windows.result()

    def _read(self, piece: _Piece, turn: int) -> list[Window]:
        slot = turn * self.plan.schedule.slots
        specs = self.plan.inputs(piece.progress.step.tensor)
        return [
            self.reader.read(slot + place, spec, piece.first, piece.count) for place, spec in enumerate(specs)
        ]

    def _pieces(self) -> Iterator[_Piece]:
        for step in self._steps():
            progress = _Progress(step, len(self.plan.inputs(step.tensor)))
            end = step.start + step.count
            block = self.plan.schedule.block
            for first in range(step.start, end, block):
                if self.run_.stop.is_set():
                    return
                count = min(block, end - first)
                yield _Piece(progress, first, count, last=first + count == end)

    def _steps(self) -> Iterator[Step]:
        """Steps for this worker, each after the kernel was asked to read those that come next."""
        ahead: deque[Step] = deque()
        ahead_bytes = 0
        while True:
            while ahead_bytes < _AHEAD_BYTES and (step := self.run_.next_step()) is not None:
                for spec in self.plan.inputs(step.tensor):
                    self.reader.read_ahead(spec, step.start, step.count)
                ahead.append(step)
                ahead_bytes += self.plan.step_bytes(step)
            if not ahead:
                return
            step = ahead.popleft()
            ahead_bytes -= self.plan.step_bytes(step)
            yield step
