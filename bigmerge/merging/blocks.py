"""What a merge method works on: blocks of tensors, and the scratch buffers that hold them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bigmerge.errors import CheckpointError
from bigmerge.merging.alignment import Merged
from bigmerge.merging.measure import Statistics
from bigmerge.merging.recipe import Recipe
from bigmerge.methods.base import View


class Scratch:
    """A fixed number of buffers of `block` elements, handed out and taken back.

    Args:
        claimed: how many there are; asking for more is a defect of the method that claimed too few.
        device: where they are.
    """

    def __init__(self, block: int, claimed: int, device: torch.device) -> None:
        self.block = block
        self.claimed = claimed
        self.device = device
        self._buffers: dict[torch.dtype, list[torch.Tensor]] = {}
        self._out: dict[int, torch.Tensor] = {}

    def take(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """A buffer of `count` elements and undefined content."""
        if len(self._out) >= self.claimed:
            raise RuntimeError(f"more than the {self.claimed} scratch buffers that were claimed are in use")
        free = self._buffers.setdefault(dtype, [])
        buffer = free.pop() if free else torch.empty(self.block, dtype=dtype, device=self.device)
        self._out[buffer.data_ptr()] = buffer
        return buffer[:count]

    def give_back(self, buffer: torch.Tensor) -> None:
        """Take a buffer back."""
        whole = self._out.pop(buffer.data_ptr())
        self._buffers[whole.dtype].append(whole)

    def give_back_all(self) -> None:
        """Take all back at the end of a block."""
        for whole in self._out.values():
            self._buffers[whole.dtype].append(whole)
        self._out.clear()


class BlockView(View):
    """The view of one block at a time of the tensor that `entry` describes.

    Args:
        entry: the tensor.
        recipe: the merge.
        statistics: what the method must know of whole tensors and models.
        scratch: where blocks are converted to and computed in.
        dtype: of the arithmetic.
    """

    def __init__(
        self, entry: Merged, recipe: Recipe, statistics: Statistics, scratch: Scratch, dtype: torch.dtype
    ) -> None:
        self.tensor = entry.name
        self.weights = recipe.weights
        self.target = recipe.target
        self.tensor_moments = statistics.of_tensor(entry.name)
        self.model_moments = statistics.of_model
        self._entry = entry
        self._kinds = sorted(entry.companions)
        self._scratch = scratch
        self._dtype = dtype
        self._tensors: Sequence[torch.Tensor] = ()
        self._least: list[tuple[str, int, torch.Tensor]] = []

    def show(self, tensors: Sequence[torch.Tensor]) -> None:
        """Look at this block of every input, in the order of `Merged.inputs`."""
        self._tensors = tensors
        self._least.clear()

    def load(self, block: torch.Tensor) -> torch.Tensor:
        """A block of stored dtype, converted into a scratch buffer."""
        return self.scratch().copy_(block)

    def theta(self, model: int) -> torch.Tensor:
        return self.load(self._tensors[model])

    def companion(self, kind: str, model: int) -> torch.Tensor:
        place = len(self._entry.models) * (1 + self._kinds.index(kind)) + model
        block = self.load(self._tensors[place])
        self._least.append((kind, model, block.amin()))
        return block

    def scratch(self) -> torch.Tensor:
        return self._scratch.take(len(self._tensors[0]), self._dtype)

    def give_back(self, *buffers: torch.Tensor) -> None:
        for buffer in buffers:
            self._scratch.give_back(buffer)

    def take_least(self) -> list[tuple[str, int, torch.Tensor]]:
        """(companion, model, least element) of every companion block that the method has looked at."""
        least, self._least = self._least, []
        return least

    def check(self, least: Sequence[tuple[str, int, torch.Tensor]]) -> None:
        """Check what `take_least` gave; on another device this waits for it.

        Raises:
            CheckpointError: a companion has a negative element.
        """
        for kind, model, value in least:
            if value < 0:
                spec = self._entry.companions[kind][model]
                raise CheckpointError(
                    f"{spec.path}: tensor {spec.name!r} of a {kind} has a negative element",
                    hint="a diagonal Fisher is a mean of squares; was another kind of file given?",
                    file=str(spec.path),
                    tensor=spec.name,
                )
