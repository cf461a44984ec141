"""Does steps of a plan in several threads, and keeps a journal of what is safely stored.

Worker threads take steps in output order. One more thread waits for data to reach the disk and then records the
finished steps, so that workers never wait for the disk's flush. Whatever happens to the process, the journal
never claims what is not stored.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from bigmerge.errors import Interrupted
from bigmerge.merging.measure import Statistics
from bigmerge.merging.plan import Plan
from bigmerge.merging.profile import Profile, Stopwatch
from bigmerge.merging.worker import Shared, Stores, Worker
from bigmerge.storage.journal import Entry

#: how much written data may wait for its journal entries, and how long
_COMMIT_BYTES = 256 << 20
_COMMIT_SECONDS = 2.0
_POLL_SECONDS = 0.1


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


class _Thread(threading.Thread):
    """A thread that tells when it has done its work.

    Before Python 3.13 `join` and `is_alive` take a live thread for ended after an exception, such as that of Ctrl-C,
    has interrupted a `join`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.ended = threading.Event()

    def run(self) -> None:
        """Do the work."""
        try:
            super().run()
        finally:
            self.ended.set()


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Have signals wait, lest one leaves it open whether a thread was started."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
        self.shared = Shared(map(plan.step, numbers), commit_bytes=_COMMIT_BYTES)
        self.step_count = len(numbers)
        self.stored_count = 0
        self.workers_done = False
        self.failure: BaseException | None = None
        self.profiles: list[Profile] = []

    # -- the main thread -------------------------------------------------------------------------------------

    def run(self, moved: Callable[[int], None]) -> Profile:
        """Start the threads, tell of progress, and see every one of them end."""
        workers = [
            _Thread(target=self._guard, args=(self._work,), name=f"bigmerge-{number}", daemon=True)
            for number in range(self.plan.schedule.workers)
        ]
        committer = _Thread(target=self._guard, args=(self._commit,), name="bigmerge-commit", daemon=True)
        watch = Stopwatch()
        interrupted = ended = False
        while not ended:
            # Ctrl-C may come anywhere in here; the files must stay open until every thread has ended.
            try:
                self._see_to_end(workers, committer, watch, moved)
                ended = True
            except KeyboardInterrupt:
                interrupted = True
                self.shared.stop.set()
            except Exception as error:  # of `moved`
                self.failure = self.failure or error
                self.shared.stop.set()
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
        workers: list[_Thread],
        committer: _Thread,
        watch: Stopwatch,
        moved: Callable[[int], None],
    ) -> None:
        """Start what has not been started, and wait for all of it. Can be called again after an interruption."""
        for thread in (committer, *workers):
            if thread.ident is None and not (self.shared.stop.is_set() and thread is not committer):
                with _signals_held():
                    thread.start()
        for thread in workers:
            while thread.ident is not None and not thread.ended.wait(_POLL_SECONDS):
                if not self.shared.stop.is_set():
                    moved(self.shared.moved)
        watch.lap("read")  # nobody asks for it: the workers keep their own time
        self.workers_done = True
        self.shared.wake.set()
        committer.ended.wait()
        for thread in (committer, *workers):
            if thread.ident is not None:
                thread.join()
        watch.lap("wait")
        if not self.shared.stop.is_set():
            moved(self.shared.moved)

    def _guard(self, work: Callable[[], None]) -> None:
        """Run a thread's work; the first failure stops all threads and is raised by the main thread."""
        try:
            work()
        except BaseException as error:
            with self.shared.lock:
                self.failure = self.failure or error
            self.shared.stop.set()

    # -- workers ---------------------------------------------------------------------------------------------

    def _work(self) -> None:
        torch.set_num_threads(1)
        worker = Worker(self.plan, self.stores, self.statistics, self.shared)
        try:
            worker.run()
        finally:
            with self.shared.lock:
                self.profiles.append(worker.watch.profile)

    # -- the committer ---------------------------------------------------------------------------------------

    def _commit(self) -> None:
        last = False
        while not last:
            self.shared.wake.wait(_COMMIT_SECONDS)
            self.shared.wake.clear()
            last = self.workers_done
            entries = self.shared.take_finished()
            if entries:
                numbers = {self.plan.step(entry.number).tensor for entry in entries}
                self.stores.writer.sync(self.plan.tensors[number].name for number in numbers)
                self.stores.journal.append(entries)
                for entry in entries:
                    self.stored(entry)
                self.stored_count += len(entries)
