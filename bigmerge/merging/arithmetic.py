"""Turns windows of inputs into windows of the output: on the host, or through buffers on another device.

Both do the same operations on the same blocks. Additions, multiplications and conversions round alike
everywhere; see docs/performance.md for what may differ on a GPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch

from bigmerge.checkpoints.dtypes import byte_count, torch_dtype
from bigmerge.merging.alignment import Merged
from bigmerge.merging.blocks import BlockView, Scratch
from bigmerge.merging.measure import Statistics
from bigmerge.merging.plan import Plan
from bigmerge.merging.values import check_block, check_convertible
from bigmerge.merging.windows import Window, as_bytes
from bigmerge.storage.buffers import ALIGNMENT, allocate


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
        self._outputs: list[torch.Tensor] = []  # bytes, `Schedule.outputs` of them
        self._view: BlockView | None = None
        self._number = -1

    @abstractmethod
    def start(self, number: int, windows: Sequence[Window], turn: int) -> Callable[[], memoryview]:
        """Begin to compute a window of the output tensor number `number`.

        Args:
            number: which tensor; see `Plan.tensors`.
            windows: of its inputs, in the order of `Plan.inputs`; not to be released before the end.
            turn: counts the calls; that of `Schedule.outputs` calls ago must be done with.

        Returns:
            a function that waits for the end and gives the window's bytes.

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

    def _place(self, number: int, first: int, nbytes: int, width: int, turn: int) -> torch.Tensor:
        """Memory for a window of the output that lies as in its file, which direct writes need.

        Unless elements, which are `width` bytes wide, lie there as they cannot in memory.
        """
        offset = byte_count(self.plan.dtypes[number], first)
        _, position = self.plan.layout.place(self.plan.tensors[number].name, offset)
        lead = position % ALIGNMENT if position % width == 0 else 0
        return self._outputs[turn % len(self._outputs)][lead : lead + nbytes]


class HostArithmetic(Arithmetic):
    """Computes at once, block by block in the cache, on what was read."""

    def __init__(self, plan: Plan, statistics: Statistics) -> None:
        super().__init__(plan, statistics, torch.device("cpu"))
        buffers = allocate([plan.schedule.output_bytes] * plan.schedule.outputs)
        self._outputs = [torch.frombuffer(buffer, dtype=torch.uint8) for buffer in buffers]

    def start(self, number: int, windows: Sequence[Window], turn: int) -> Callable[[], memoryview]:
        entry = self.plan.tensors[number]
        name = self.plan.dtypes[number]
        first, count = windows[0].first, windows[0].count
        if not isinstance(entry, Merged) and name == entry.spec.dtype:
            # A copy, so that writing it never meets a page that is gone.
            out = self._place(number, first, len(windows[0].raw), 1, turn)
            out.copy_(torch.frombuffer(windows[0].raw, dtype=torch.uint8))
            return lambda: as_bytes(out)
        dtype = torch_dtype(name)
        out = self._place(number, first, count * dtype.itemsize, dtype.itemsize, turn).view(dtype)
        size = self.plan.schedule.block
        for start in range(0, count, size):
            part = out[start : start + size]
            inputs = [window.part(first + start, len(part)) for window in windows]
            if isinstance(entry, Merged):
                view, block = self._combine(number, [window.tensor() for window in inputs])
                view.check(view.take_least())
                part.copy_(block)
                check_block(entry.name, block, part, inputs)
                self._scratch.give_back_all()
            else:
                check_convertible(entry.name, inputs[0], dtype)
                part.copy_(inputs[0].tensor())
        return lambda: as_bytes(out)
