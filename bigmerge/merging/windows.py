"""Windows of input tensors, and the scratch buffers that arithmetic works in. One set for each worker."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from bigmerge.checkpoints.checkpoint import TensorSpec
from bigmerge.checkpoints.dtypes import byte_count, itemsize, torch_dtype
from bigmerge.checkpoints.fisher_facts import Moments
from bigmerge.errors import CheckpointError
from bigmerge.methods.base import View
from bigmerge.storage.mapping import Mappings

with warnings.catch_warnings():
    # torch warns once that mapped input is read-only; nothing here ever writes to it.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


@dataclass(frozen=True)
class Window:
    """Elements `first` to `first + count` of one input tensor, resident until `release`."""

    spec: TensorSpec
    first: int
    count: int
    mappings: Mappings

    @property
    def _range(self) -> tuple[int, int]:
        start = byte_count(self.spec.dtype, self.first)
        return self.spec.start + start, byte_count(self.spec.dtype, self.first + self.count) - start

    @property
    def nbytes(self) -> int:
        return self._range[1]

    def read_ahead(self) -> None:
        """Have the window's pages read soon."""
        self.mappings[self.spec.path].read_ahead(*self._range)

    def populate(self) -> None:
        """Read the window's pages.

        Raises:
            CheckpointError: the file has changed or cannot be read.
        """
        self.mappings[self.spec.path].populate(*self._range)

    def release(self) -> None:
        """Let go of the window's pages."""
        self.mappings[self.spec.path].release(*self._range)

    def raw(self) -> memoryview:
        """The window's bytes."""
        start, nbytes = self._range
        return memoryview(self.mappings[self.spec.path].buffer)[start : start + nbytes]

    def tensor(self) -> torch.Tensor:
        """The window as a read-only 1-D tensor of the stored dtype."""
        start, _ = self._range
        dtype = torch_dtype(self.spec.dtype)
        if start % itemsize(self.spec.dtype):  # a header that was not padded
            return torch.frombuffer(bytearray(self.raw()), dtype=dtype)
        return torch.frombuffer(
            self.mappings[self.spec.path].buffer, dtype=dtype, count=self.count, offset=start
        )


class Scratch:
    """A fixed number of buffers of `block` elements, handed out and taken back.

    Args:
        claimed: how many there are; asking for more is a defect of the method that claimed too few.
    """

    def __init__(self, block: int, claimed: int) -> None:
        self.block = block
        self.claimed = claimed
        self._buffers: dict[torch.dtype, list[torch.Tensor]] = {}
        self._out: dict[int, torch.Tensor] = {}

    def take(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """A buffer of `count` elements and undefined content."""
        if len(self._out) >= self.claimed:
            raise RuntimeError(f"more than the {self.claimed} scratch buffers that were claimed are in use")
        free = self._buffers.setdefault(dtype, [])
        buffer = free.pop() if free else torch.empty(self.block, dtype=dtype)
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
    """The view of one block at a time within the windows of one tensor."""

    def __init__(
        self,
        tensor: str,
        *,
        weights: Sequence[float],
        target: int,
        models: Sequence[torch.Tensor],
        companions: Mapping[str, Sequence[torch.Tensor]],
        specs: Mapping[str, Sequence[TensorSpec]],
        tensor_moments: Mapping[str, Sequence[Moments]],
        model_moments: Mapping[str, Sequence[Moments]],
        scratch: Scratch,
        dtype: torch.dtype,
    ) -> None:
        self.tensor = tensor
        self.weights = weights
        self.target = target
        self.tensor_moments = tensor_moments
        self.model_moments = model_moments
        self._models = models
        self._companions = companions
        self._specs = specs
        self._scratch = scratch
        self._dtype = dtype
        self._start = 0
        self._count = 0

    def move(self, start: int, count: int) -> None:
        """Look at `count` elements from element `start` of the windows."""
        self._start = start
        self._count = count

    def load(self, window: torch.Tensor) -> torch.Tensor:
        """The block of any window, converted into a scratch buffer."""
        return self.scratch().copy_(window[self._start : self._start + self._count])

    def theta(self, model: int) -> torch.Tensor:
        return self.load(self._models[model])

    def companion(self, kind: str, model: int) -> torch.Tensor:
        block = self.load(self._companions[kind][model])
        if block.numel() and block.min() < 0:
            spec = self._specs[kind][model]
            raise CheckpointError(
                f"{spec.path}: tensor {spec.name!r} of a {kind} has a negative element",
                hint="a diagonal Fisher is a mean of squares; was another kind of file given?",
                file=str(spec.path),
                tensor=spec.name,
            )
        return block

    def scratch(self) -> torch.Tensor:
        return self._scratch.take(self._count, self._dtype)

    def give_back(self, *buffers: torch.Tensor) -> None:
        for buffer in buffers:
            self._scratch.give_back(buffer)
