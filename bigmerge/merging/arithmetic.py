"""Turns windows of inputs into windows of the output: on the host, or through buffers on another device.

Both do the same operations on the same blocks. Additions, multiplications and conversions round alike
everywhere; see docs/performance.md for what may differ on a GPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch

from bigmerge.checkpoints.dtypes import BITS, torch_dtype
from bigmerge.merging.alignment import Merged
from bigmerge.merging.blocks import BlockView, Scratch
from bigmerge.merging.measure import Statistics
from bigmerge.merging.plan import Plan
from bigmerge.merging.values import check_block, check_convertible
from bigmerge.merging.windows import Window, as_bytes


class Arithmetic(ABC):
    """What one worker computes with.

    Args:
        plan: the merge.
        statistics: what the method must know of whole tensors and models.
    """

    def __init__(self, plan: Plan, statistics: Statistics, device: torch.device) -> None:
        self.plan = plan
        self._statistics = statistics
        recipe = plan.recipe
        self._scratch = Scratch(plan.schedule.block, recipe.method.buffers(len(recipe.sources)) + 1, device)
        self._view: BlockView | None = None
        self._number = -1

    @abstractmethod
    def start(self, number: int, windows: Sequence[Window], turn: int) -> Callable[[], memoryview]:
        """Begin to compute a window of the output tensor number `number`.

        Args:
            number: which tensor; see `Plan.tensors`.
            windows: of its inputs, in the order of `Plan.inputs`; not to be released before the end.
            turn: which set of buffers to use; see `Schedule.sets`.

        Returns:
            a function that waits for the end and gives the window's bytes, valid until the next use of `turn`.

        Raises:
            CheckpointError: a value cannot be merged; from here or from what is returned.
        """

    def _combine(self, number: int, tensors: Sequence[torch.Tensor]) -> tuple[BlockView, torch.Tensor]:
        """The merged block, in a scratch buffer, and the view that it was made with."""
        entry = self.plan.tensors[number]
        assert isinstance(entry, Merged)
        recipe = self.plan.recipe
        if self._view is None or number != self._number:
            dtype = torch_dtype(entry.compute_dtype)
            self._view = BlockView(entry, recipe, self._statistics, self._scratch, dtype)
            self._number = number
        view = self._view
        view.show(tensors)
        block = recipe.method.combine(view)
        if entry.base is not None and recipe.scale != 1.0:
            base = view.load(tensors[-1])
            block.sub_(base).mul_(recipe.scale).add_(base)
        return view, block


class HostArithmetic(Arithmetic):
    """Computes at once, in the cache, on what was read."""

    def __init__(self, plan: Plan, statistics: Statistics) -> None:
        super().__init__(plan, statistics, torch.device("cpu"))
        self._out = torch.empty(output_window_bytes(plan), dtype=torch.uint8)

    def start(self, number: int, windows: Sequence[Window], turn: int) -> Callable[[], memoryview]:
        del turn
        entry = self.plan.tensors[number]
        name = self.plan.dtypes[number]
        if not isinstance(entry, Merged) and name == entry.spec.dtype:
            # A copy, so that writing it never meets a page that is gone.
            out = self._out[: len(windows[0].raw)]
            out.copy_(torch.frombuffer(windows[0].raw, dtype=torch.uint8))
            return lambda: as_bytes(out)
        dtype = torch_dtype(name)
        out = self._out[: windows[0].count * dtype.itemsize].view(dtype)
        if isinstance(entry, Merged):
            view, block = self._combine(number, [window.tensor() for window in windows])
            view.check(view.take_least())
            out.copy_(block)
            check_block(entry.name, block, out, windows)
            self._scratch.give_back_all()
        else:
            check_convertible(entry.name, windows[0], dtype)
            out.copy_(windows[0].tensor())
        return lambda: as_bytes(out)


def output_window_bytes(plan: Plan) -> int:
    """Bytes of the largest window of the output."""
    return max((-(-BITS[dtype] * plan.schedule.block // 8) for dtype in plan.dtypes), default=0)
