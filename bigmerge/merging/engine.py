"""Carries out a plan: reads windows, merges blocks, writes, and keeps a journal of what is safely stored.

Worker threads take steps in output order. One more thread waits for data to reach the disk and then records the
finished steps, so that workers never wait for the disk's flush. Whatever happens to the process, the journal
never claims what is not stored.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import xxhash
from tqdm import tqdm

from bigmerge.checkpoints.dtypes import byte_count, torch_dtype
from bigmerge.checkpoints.fisher_facts import Moments
from bigmerge.errors import Interrupted
from bigmerge.merging.alignment import Merged
from bigmerge.merging.measure import measure_moments
from bigmerge.merging.plan import BLOCK, Plan, Step, compute_dtype
from bigmerge.merging.records import StepRecords
from bigmerge.merging.resuming import replay
from bigmerge.merging.values import as_bytes, check_block, convert
from bigmerge.merging.windows import BlockView, Scratch, Window
from bigmerge.progress import progress_bar
from bigmerge.storage.journal import Entry, Journal
from bigmerge.storage.mapping import Mappings
from bigmerge.storage.staging import Staging
from bigmerge.storage.writing import CheckpointWriter

#: how much written data may wait for its journal entries, and how long
_COMMIT_BYTES = 256 << 20
_COMMIT_SECONDS = 2.0


def execute(plan: Plan, staging: Staging, *, show_progress: bool) -> StepRecords:
    """Do every step of `plan` that an earlier run has not done, and wait until all is on the disk.

    Raises:
        Interrupted: Ctrl-C; what is finished stays and the next run goes on.
        ResumeError: an input has changed since an earlier run read it.
        CheckpointError: an input cannot be read or holds what cannot be merged.
        OutputError: the output cannot be written.
    """
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)  # the workers are the parallelism
    try:
        mappings = Mappings(spec.path for n in range(len(plan.tensors)) for spec in plan.inputs(n))
        moments = measure_moments(plan, staging.scratch, mappings, show_progress=show_progress)
        with CheckpointWriter(staging.output, plan.layout) as writer:
            writer.create()
            with Journal(staging.scratch / "journal") as journal:
                records = StepRecords(plan)
                moved = replay(
                    plan, journal, writer, mappings, records, staging.scratch, show_progress=show_progress
                )
                _Run(plan, mappings, writer, journal, records, moments).run(
                    moved, show_progress=show_progress
                )
        return records
    except Interrupted as stop:
        stop.hint = f"run the same command again to go on; unfinished work is in {staging.scratch}"
        raise
    finally:
        torch.set_num_threads(threads_before)


class _Run:
    """The threads of one execution and what they share."""

    def __init__(
        self,
        plan: Plan,
        mappings: Mappings,
        writer: CheckpointWriter,
        journal: Journal,
        records: StepRecords,
        moments: Mapping[str, list[list[Moments]]],
    ) -> None:
        self.plan = plan
        self.mappings = mappings
        self.writer = writer
        self.journal = journal
        self.records = records
        self.moments = moments
        self.model_moments = {
            kind: [sum(row, Moments(0.0, 0.0, 0)) for row in rows] for kind, rows in moments.items()
        }
        self.rows = {entry.name: number for number, entry in enumerate(plan.alignment.merged)}
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.wake = threading.Event()
        self.workers_done = False
        self.failure: BaseException | None = None
        self.moved = 0  # bytes read and written, for the progress bar
        self.pending: list[Entry] = []
        self.pending_bytes = 0

    # -- the main thread -------------------------------------------------------------------------------------

    def run(self, moved: int, *, show_progress: bool) -> None:
        """Start the threads, show progress, and see every one of them end."""
        plan = self.plan
        steps = self._steps_to_do()
        workers = [
            threading.Thread(
                target=self._guard, args=(self._work, steps), name=f"bigmerge-{number}", daemon=True
            )
            for number in range(plan.workers)
        ]
        committer = threading.Thread(
            target=self._guard, args=(self._commit,), name="bigmerge-commit", daemon=True
        )
        self.moved = moved
        interrupted = False
        total = plan.transfer_bytes
        with progress_bar(total=total, unit="B", desc="merging", done=moved, show=show_progress) as bar:
            ended = False
            while not ended:
                # Ctrl-C may come anywhere in here; the files must stay open until every thread has ended.
                try:
                    self._see_to_end(workers, committer, bar)
                    ended = True
                except KeyboardInterrupt:
                    interrupted = True
                    self.stop.set()
        if self.failure is not None:
            raise self.failure
        done, all_steps = int(self.records.done.sum()), plan.step_count
        if interrupted and done < all_steps:
            raise Interrupted(
                f"interrupted with {done} of {all_steps} steps stored", done=done, steps=all_steps
            )

    def _see_to_end(
        self, workers: list[threading.Thread], committer: threading.Thread, bar: tqdm[Any]
    ) -> None:
        """Start what has not been started, and wait for all of it. Can be called again after an interruption."""
        for thread in (committer, *workers):
            if thread.ident is None and not (self.stop.is_set() and thread is not committer):
                thread.start()
        for thread in (*workers, committer):
            while thread.is_alive():
                if thread is committer:
                    self.workers_done = True
                    self.wake.set()
                thread.join(0.1)
                bar.update(self.moved - bar.n)
        bar.update(self.moved - bar.n)

    def _guard(self, work: Callable[..., None], *arguments: Any) -> None:
        """Run a thread's work; the first failure stops all threads and is raised by the main thread."""
        try:
            work(*arguments)
        except BaseException as error:
            with self.lock:
                self.failure = self.failure or error
            self.stop.set()

    def _steps_to_do(self) -> Iterator[Step]:
        for number in np.flatnonzero(~self.records.done):
            yield self.plan.step(int(number))

    # -- workers ---------------------------------------------------------------------------------------------

    def _work(self, steps: Iterator[Step]) -> None:
        torch.set_num_threads(1)
        recipe = self.plan.recipe
        scratch = Scratch(BLOCK, recipe.method.buffers(len(recipe.sources)) + 1)
        following = self._next(steps)
        while following is not None and not self.stop.is_set():
            step, following = following, self._next(steps)
            if following is not None:
                for window in self._windows(following, following.start):
                    window.read_ahead()
            self._do(step, scratch)

    def _next(self, steps: Iterator[Step]) -> Step | None:
        with self.lock:
            return next(steps, None)

    def _windows(self, step: Step, first: int) -> list[Window]:
        count = min(self.plan.window, step.start + step.count - first)
        return [Window(spec, first, count, self.mappings) for spec in self.plan.inputs(step.tensor)]

    def _do(self, step: Step, scratch: Scratch) -> None:
        """Merge one step window by window, write it, and hand it to the committer."""
        entry = self.plan.tensors[step.tensor]
        dtype = self.plan.dtypes[step.tensor]
        output_digest = xxhash.xxh3_128()
        input_digests = [xxhash.xxh3_64() for _ in self.plan.inputs(step.tensor)]
        for first in range(step.start, step.start + step.count, self.plan.window):
            windows = self._windows(step, first)
            for window, digest in zip(windows, input_digests, strict=True):
                window.populate()
                digest.update(window.raw())
            if isinstance(entry, Merged):
                data = as_bytes(self._merge(entry, windows, torch_dtype(dtype), scratch))
            elif dtype != entry.spec.dtype:
                data = as_bytes(convert(entry.name, windows[0], torch_dtype(dtype)))
            else:
                data = windows[0].raw()
            output_digest.update(data)
            self.writer.write(entry.name, byte_count(dtype, first), data)
            for window in windows:
                window.release()
            with self.lock:
                self.moved += len(data) + sum(window.nbytes for window in windows)
        finished = Entry(
            step.number, output_digest.digest(), tuple(digest.digest() for digest in input_digests)
        )
        with self.lock:
            self.pending.append(finished)
            self.pending_bytes += byte_count(dtype, step.count)
            full = self.pending_bytes >= _COMMIT_BYTES
        if full:
            self.wake.set()

    def _merge(
        self, entry: Merged, windows: list[Window], dtype: torch.dtype, scratch: Scratch
    ) -> torch.Tensor:
        """The merged window in the output's dtype."""
        recipe = self.plan.recipe
        tensors = [window.tensor() for window in windows]
        models = len(entry.models)
        kinds = sorted(entry.companions)
        row = self.rows[entry.name]
        view = BlockView(
            entry.name,
            weights=recipe.weights,
            target=recipe.target,
            models=tensors[:models],
            companions={kind: tensors[models * (n + 1) : models * (n + 2)] for n, kind in enumerate(kinds)},
            specs=entry.companions,
            tensor_moments={
                kind: [of_model[row] for of_model in rows] for kind, rows in self.moments.items()
            },
            model_moments=self.model_moments,
            scratch=scratch,
            dtype=torch_dtype(compute_dtype(entry)),
        )
        out = torch.empty(windows[0].count, dtype=dtype)
        for start in range(0, len(out), BLOCK):
            count = min(BLOCK, len(out) - start)
            view.move(start, count)
            block = recipe.method.combine(view)
            if entry.base is not None and recipe.scale != 1.0:
                base = view.load(tensors[-1])
                block.sub_(base).mul_(recipe.scale).add_(base)
            check_block(entry.name, block, dtype, windows)
            out[start : start + count].copy_(block)
            scratch.give_back_all()
        return out

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
                self.writer.sync(self.plan.tensors[number].name for number in numbers)
                self.journal.append(entries)
                for entry in entries:
                    self.records.add(entry)
