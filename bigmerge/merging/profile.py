"""Where the time of a merge goes."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from bigmerge.quantities import format_bytes

#: stages of a worker's time, and what is moved in each
STAGES = {
    "read": "waiting for inputs and bringing them into memory",
    "digest": "digests of inputs and outputs",
    "compute": "arithmetic and conversions",
    "write": "handing the output to the kernel, or waiting for the disk to take it",
    "wait": "until all is on the disk, after the last step",
}


@dataclass
class Profile:
    """Seconds and bytes by stage.

    Attributes:
        seconds, moved: of each stage, over all workers together; "wait" is of the whole run.
        workers: how many worked side by side.
        beside: stages that went on beside the others, so that only the waiting for them is in `seconds`.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    moved: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))
    workers: int = 0
    beside: set[str] = field(default_factory=set)

    @classmethod
    def total(cls, profiles: Iterable[Profile]) -> Profile:
        """All workers of all processes together. They wait side by side: the longest wait counts."""
        whole = cls()
        for profile in profiles:
            whole.workers += profile.workers
            whole.beside |= profile.beside
            for stage in STAGES:
                whole.moved[stage] += profile.moved[stage]
                seconds = whole.seconds[stage], profile.seconds[stage]
                whole.seconds[stage] = max(seconds) if stage == "wait" else sum(seconds)
        return whole

    def as_json(self) -> dict[str, Any]:
        """What `--profile --json` prints."""
        return {
            "workers": self.workers,
            **{
                stage: {
                    "bytes": self.moved[stage],
                    "seconds": round(self.seconds[stage], 4),
                    "gigabytes_per_second": self._rate(stage),
                }
                for stage in STAGES
            },
        }

    def describe(self) -> str:
        """What `--profile` prints."""
        lines = [f"{'stage':8} {'bytes':>12} {'seconds':>9} {'GB/s':>7}"]
        for stage, meaning in STAGES.items():
            rate = self._rate(stage)
            lines.append(
                f"{stage:8} {format_bytes(self.moved[stage]):>12} {self.seconds[stage]:9.3f} "
                f"{'' if rate is None else f'{rate:.2f}':>7}  {meaning}"
            )
        lines.append(f"seconds of {self.workers} worker(s) added up; GB/s of each worker, of 10^9 bytes")
        return "\n".join(lines)

    def _rate(self, stage: str) -> float | None:
        if not self.moved[stage] or not self.seconds[stage] or stage in self.beside:
            return None
        return round(self.moved[stage] / self.seconds[stage] / 1e9, 3)


class Stopwatch:
    """Divides one worker's time among stages."""

    def __init__(self, beside: Iterable[str] = ()) -> None:
        self.profile = Profile(workers=1, beside=set(beside))
        self._last = time.perf_counter()

    def lap(self, stage: str, moved: int = 0) -> None:
        """The time since the last lap belongs to `stage`, which moved so many bytes."""
        now = time.perf_counter()
        self.profile.seconds[stage] += now - self._last
        self.profile.moved[stage] += moved
        self._last = now
