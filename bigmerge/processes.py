"""Processes that share a piece of work: who this one is, and the few things that they say to each other.

Most of the time each works alone. What remains is agreeing on errors, so that one message ends all of them, and
small exchanges before and after.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bigmerge import errors
from bigmerge.errors import BigmergeError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

#: nothing between two collectives may take longer; what does is waited for through `Notices`
_PATIENCE = timedelta(hours=2)
_POLL_SECONDS = 0.05


def joined_world_size() -> int:
    """How many processes a launcher (accelerate launch, torchrun) has started this one among; 1 for none."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def joined_local_world_size() -> int:
    """How many of the processes that a launcher has started run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def joined_rank() -> int:
    """This process's number among those that a launcher has started; 0 where there is none."""
    return int(os.environ.get("RANK", "0"))


class Group:
    """The processes of one job, joined through Accelerate's `PartialState`.

    Attributes:
        rank: this process, from 0.
        world: how many there are.
        device: where this process works.
    """

    def __init__(self, *, cpu: bool) -> None:
        import torch

        cpu = cpu or not torch.cuda.is_available()
        self.rank = 0
        self.world = 1
        self.device = torch.device("cpu" if cpu else "cuda")
        self._leave: Callable[[], None] | None = None
        if joined_world_size() > 1:
            from accelerate import PartialState

            # A program that calls bigmerge may have joined already; then the group is its own to leave.
            ours = not torch.distributed.is_initialized()
            state = PartialState(cpu=cpu, timeout=_PATIENCE)
            self.rank = state.process_index
            self.world = state.num_processes
            self.device = state.device
            self._leave = state.destroy_process_group if ours else None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every process's value, in order of rank, on every process. Values are pickled."""
        if self.world == 1:
            return [value]
        from accelerate.utils import gather_object

        gathered: list[T] = gather_object([value])
        return gathered

    def together(self, action: Callable[[], T]) -> T:
        """Run `action` on every process; if it fails anywhere, raise that error everywhere.

        Raises:
            BigmergeError: the error of the lowest rank that has one.
        """
        result: T | None = None
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:
            failure = error
        if self.world > 1:
            told = self.gather(None if failure is None else describe_error(failure))
            for rank, described in enumerate(told):
                if described is not None and rank != self.rank:
                    restored = restore_error(described)
                    restored.reported = True
                    raise restored from failure
                if described is not None:
                    break
        if failure is not None:
            raise failure
        return result  # type: ignore[return-value]

    def main_first(self, action: Callable[[], T]) -> T:
        """Run `action` on the main process and then on the others, which find caches that it filled."""
        kept: list[T] = []

        def on_main() -> None:
            if self.is_main:
                kept.append(action())

        self.together(on_main)
        return self.together(lambda: kept[0] if kept else action())

    def from_main(self, action: Callable[[], T]) -> T:
        """Run `action` on the main process alone and give its result (pickled) to all."""
        value = self.together(lambda: action() if self.is_main else None)
        return self.gather(value)[0]  # type: ignore[return-value]

    def sum_to_main(self, tensor: torch.Tensor) -> None:
        """Add up `tensor` over all processes, in place on the main one; elsewhere it is spent."""
        if self.world > 1 and tensor.numel():
            import torch

            torch.distributed.reduce(tensor, dst=0, op=torch.distributed.ReduceOp.SUM)

    def settle(self) -> None:
        """Wait for all processes after the last exchange.

        Gloo's threads let go of an exchange's Python objects some time after it; a process that ends just then
        is aborted. A barrier has no such objects, and by its end those of what came before are gone.
        """
        if self.world > 1:
            import torch

            torch.distributed.barrier()

    def close(self) -> None:
        """Leave the group."""
        if self._leave is not None:
            self._leave()
            self._leave = None


class Notices:
    """Small files through which busy processes tell each other that they ended.

    A collective would block: a process that waits in one cannot react to a signal, and GPU collectives give
    up after a while, though one process may finish long before another.
    """

    def __init__(self, directory: Path, group: Group) -> None:
        self._directory = directory
        self._group = group

    def clear(self) -> None:
        """Forget what an earlier run left. For one process, before the others start."""
        self._directory.mkdir(parents=True, exist_ok=True)
        for path in self._directory.glob("rank-*"):
            path.unlink()

    def done(self) -> None:
        """Say that this process is through with its share."""
        self._path("done", self._group.rank).touch()

    def failed(self, error: Exception) -> None:
        """Say that this process cannot go on, and why."""
        write_error(self._path("error", self._group.rank), error)

    def check(self) -> None:
        """Look whether another process has failed.

        Raises:
            BigmergeError: it has; this is its error.
        """
        if self._group.world == 1:
            return
        for path in sorted(self._directory.glob("rank-*.error")):
            if path != self._path("error", self._group.rank):
                raise read_error(path)

    def wait(self, tick: Callable[[], None]) -> None:
        """Wait until every process is through, calling `tick` now and then.

        Raises:
            BigmergeError: a process has failed; or whatever `tick` raises.
        """
        while any(not self._path("done", rank).exists() for rank in range(self._group.world)):
            tick()
            self.check()
            time.sleep(_POLL_SECONDS)

    def _path(self, kind: str, rank: int) -> Path:
        return self._directory / f"rank-{rank}.{kind}"


def describe_error(error: BaseException) -> dict[str, Any]:
    """`error` as plain values."""
    if isinstance(error, BigmergeError):
        return error.as_json()
    return {"error": "BigmergeError", "message": f"{type(error).__name__}: {error}", "hint": None, "data": {}}


def restore_error(described: dict[str, Any]) -> BigmergeError:
    """The error that `describe_error` described."""
    kind = getattr(errors, described["error"], BigmergeError)
    restored = kind(described["message"], hint=described["hint"], **described["data"])
    assert isinstance(restored, BigmergeError)
    return restored


def write_error(path: Path, error: BaseException) -> None:
    """Keep `error` in a file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(describe_error(error)), encoding="utf-8")
    temporary.replace(path)


def read_error(path: Path) -> BigmergeError:
    """The error that `write_error` kept."""
    return restore_error(json.loads(path.read_text(encoding="utf-8")))
