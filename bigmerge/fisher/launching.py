"""Starts the processes of an estimate through Accelerate's launcher and waits for them.

The launcher runs `python -m bigmerge.fisher.worker DIRECTORY` once per process. Settings, the result and errors
travel through small files in that directory, so nothing but the progress bar reaches the terminal twice.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bigmerge.errors import BigmergeError, EstimationError, Interrupted, UsageError
from bigmerge.fisher.settings import FisherSettings, ProcessSettings
from bigmerge.processes import read_error

logger = logging.getLogger("bigmerge.fisher")

SETTINGS_FILE = "settings.json"
RESULT_FILE = "result.json"
#: seconds that interrupted processes have to save their sums
_SHUTDOWN_SECONDS = 600
#: loggers that report every exit of a child at length
_CHATTER = ("torch.distributed.elastic", "torch.distributed.run", "torch.distributed.launcher")


def count_processes(settings: ProcessSettings, bytes_each: int) -> tuple[int, bool]:
    """How many processes to start, and whether they stay on the CPU.

    Args:
        settings: what was asked for.
        bytes_each: memory that one process needs for the model and its sums.

    Raises:
        UsageError: more GPUs were asked for than there are.
    """
    import torch

    gpus = 0 if settings.cpu else torch.cuda.device_count()
    if settings.num_processes is not None:
        if gpus and settings.num_processes > gpus:
            raise UsageError(
                f"{settings.num_processes} processes were asked for, but there are {gpus} GPUs",
                hint="leave out --num-processes, or add --cpu",
                gpus=gpus,
                num_processes=settings.num_processes,
            )
        if settings.multi_gpu and not gpus:
            logger.warning(
                "NO GPU WAS FOUND: --multi-gpu goes on with %d CPU processes", settings.num_processes
            )
        return settings.num_processes, gpus == 0
    if not settings.multi_gpu:
        return 1, gpus == 0
    if gpus:
        return gpus, False
    cores = len(os.sched_getaffinity(0))
    fitting = available_memory() // max(1, bytes_each)
    count = max(1, min(cores, fitting))
    reason = (
        f"one for each of {cores} cores" if count == cores else f"as many as memory holds of {cores} cores"
    )
    logger.warning("NO GPU WAS FOUND: --multi-gpu goes on with %d CPU process(es), %s", count, reason)
    return count, True


def available_memory() -> int:
    """Bytes of memory that programs could take without swapping, as the kernel estimates them."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("every kernel since 3.14 says MemAvailable")


def launch(settings: FisherSettings, count: int, *, cpu: bool) -> dict[str, Any]:
    """Run `settings` in `count` processes and return what the main one reports.

    Raises:
        BigmergeError: whatever a process raised, once.
        Interrupted: a signal stopped the run; the processes have saved their sums.
    """
    with tempfile.TemporaryDirectory(prefix="bigmerge-fisher-") as name:
        directory = Path(name)
        (directory / SETTINGS_FILE).write_text(json.dumps(settings.as_json()), encoding="utf-8")
        failure: BaseException | None = None
        try:
            with _handlers_restored(), _silenced(), _environment(cpu=cpu):
                _run(directory, count)
        except (Exception, KeyboardInterrupt) as error:
            failure = error
        if failure is not None:
            raise _explain(directory, failure) from failure
        result: dict[str, Any] = json.loads((directory / RESULT_FILE).read_text(encoding="utf-8"))
        return result


def _run(directory: Path, count: int) -> None:
    from accelerate.commands.launch import launch_command_parser, multi_gpu_launcher

    arguments = [
        "--multi_gpu",
        f"--num_processes={count}",
        "--num_machines=1",
        "--mixed_precision=no",
        "--dynamo_backend=no",
        "--main_process_port=0",
        f"--num_cpu_threads_per_process={_threads(count)}",
        "--module",
        "bigmerge.fisher.worker",
        str(directory),
    ]
    parsed = launch_command_parser().parse_args(arguments)
    # What the launcher's own command would take from the user's Accelerate config: that config is about
    # training runs, and could turn this one into something else.
    parsed.debug = False
    parsed.gpu_ids = "all"
    parsed.standalone = True  # find a free port by itself
    parsed.shutdown_timeout = _SHUTDOWN_SECONDS
    # Accelerate starts several CPU processes only through this launcher, whose name is narrower than what
    # it does; the workers themselves choose gloo.
    multi_gpu_launcher(parsed)


def _explain(directory: Path, failure: BaseException) -> BigmergeError:
    """The one error to report for a failed launch."""
    told = [read_error(path) for path in sorted(directory.glob("rank-*.error"))]
    for error in told:
        if not isinstance(error, Interrupted):
            return error
    failures = getattr(failure, "failures", {})
    for rank, ended in failures.items():
        if ended.exitcode < 0 and ended.exitcode != -signal.SIGTERM:  # which the launcher sends to the rest
            number = signal.Signals(-ended.exitcode)
            return EstimationError(
                f"process {rank} was killed ({number.name})",
                hint="often memory has run out: use fewer processes, a smaller --memory or --batch-size; the "
                "same command goes on from the last saved state",
                rank=rank,
                signal=number.name,
            )
    # Of itself, or because the launcher was told to stop, or another process ended.
    if told:
        return told[0]
    if type(failure).__name__ == "SignalException" or isinstance(failure, KeyboardInterrupt):
        return Interrupted("interrupted; the same command goes on from the last saved state")
    for rank, ended in failures.items():
        return EstimationError(
            f"process {rank} ended with exit code {ended.exitcode}; what it wrote is above", rank=rank
        )
    return EstimationError(f"the processes could not be started ({type(failure).__name__}: {failure})")


def _threads(count: int) -> int:
    """A process's share of the cores, or what the user says."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() else max(1, len(os.sched_getaffinity(0)) // count)


@contextmanager
def _environment(*, cpu: bool) -> Iterator[None]:
    """What the processes inherit beside what the launcher sets."""
    before = dict(os.environ)
    os.environ.update({"ACCELERATE_USE_CPU": str(cpu).lower(), "TOKENIZERS_PARALLELISM": "false"})
    try:
        yield
    finally:  # the launcher sets more
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _silenced() -> Iterator[None]:
    """Without the launcher's reports: the one error that matters is raised here."""
    importlib.import_module("torch.distributed.run")  # which makes them, with levels of their own
    names = [name for name in logging.root.manager.loggerDict if name.startswith(_CHATTER)]
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _handlers_restored() -> Iterator[None]:
    """The launcher installs signal handlers and leaves them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in names}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
