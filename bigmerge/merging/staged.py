"""Arithmetic on another device: windows stream through pinned buffers while earlier ones are computed.

Every worker has a stream of its own, on which copies and arithmetic follow each other; several workers keep
several streams busy. The code runs on any torch device, "cpu" included, where tests hold it against the host's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bigmerge.checkpoints.dtypes import torch_dtype
from bigmerge.merging.alignment import Merged
from bigmerge.merging.arithmetic import Arithmetic, HostArithmetic
from bigmerge.merging.measure import Statistics
from bigmerge.merging.plan import Plan
from bigmerge.merging.values import check_limits
from bigmerge.merging.windows import Window, as_bytes


class StagedArithmetic(Arithmetic):
    """Computes on `device`. Tensors that are only copied stay on the host."""

    def __init__(self, plan: Plan, statistics: Statistics, device: torch.device) -> None:
        super().__init__(plan, statistics, device)
        self._host = HostArithmetic(plan, statistics)
        schedule = plan.schedule
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        pinned = device.type == "cuda"
        # One set is enough here, for on a stream the next copy waits for the arithmetic before it.
        self._inputs = [torch.empty(nbytes, dtype=torch.uint8, device=device) for nbytes in schedule.slots]
        self._result = torch.empty(schedule.output_bytes, dtype=torch.uint8, device=device)
        self._outputs = [
            torch.empty(schedule.output_bytes, dtype=torch.uint8, pin_memory=pinned)
            for _ in range(schedule.outputs)
        ]
        self._limits = [
            torch.empty(2, dtype=torch.float64, pin_memory=pinned) for _ in range(schedule.outputs)
        ]

    def start(self, number: int, windows: Sequence[Window], turn: int) -> Callable[[], memoryview]:
        entry = self.plan.tensors[number]
        if not isinstance(entry, Merged):
            return self._host.start(number, windows, turn)
        dtype = torch_dtype(self.plan.dtypes[number])
        count = windows[0].count
        out = self._place(number, windows[0].first, count * dtype.itemsize, dtype.itemsize, turn).view(dtype)
        limits = self._limits[turn % len(self._limits)]
        with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
            tensors = [
                self._send(window, buffer) for window, buffer in zip(windows, self._inputs, strict=False)
            ]
            view, block = self._combine(number, tensors)
            least = view.take_least()
            result = self._result[: count * dtype.itemsize].view(dtype)
            result.copy_(block)
            out.copy_(result, non_blocking=True)
            limits.copy_(torch.stack(torch.aminmax(block)), non_blocking=True)
            self._scratch.give_back_all()
            done: Any = self._stream.record_event() if self._stream is not None else None

        def finish() -> memoryview:
            if done is not None:
                done.synchronize()
            view.check(least)
            check_limits(entry.name, float(limits[0]), float(limits[1]), dtype, windows)
            return as_bytes(out)

        return finish

    def _send(self, window: Window, buffer: torch.Tensor) -> torch.Tensor:
        """The window on the device, in its stored dtype."""
        dtype = torch_dtype(window.spec.dtype)
        sent = buffer[: len(window.raw)]
        sent.copy_(torch.frombuffer(window.raw, dtype=torch.uint8), non_blocking=True)
        return sent.view(dtype)
