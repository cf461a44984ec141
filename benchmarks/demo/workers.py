"""Runs jobs in parallel processes of one thread each, as many as there are cores."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

Result = TypeVar("Result")


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def each(function: Callable[..., Result], jobs: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Result]]:
    """Call `function` with the arguments of every job; yields (index, result) as jobs finish.

    Jobs start in the order given, so the longest should come first.
    """
    if not jobs:
        return
    # forking after torch has started its threads can hang; a new interpreter cannot
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(cores(), len(jobs)), mp_context=context, initializer=_quiet) as pool:
        futures = {pool.submit(function, *job): index for index, job in enumerate(jobs)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _quiet() -> None:
    """End without a traceback on Ctrl-C, which the terminal sends to every process."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
