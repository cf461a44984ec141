"""Windows of input tensors: what is in memory of them at a time."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bigmerge.checkpoints.checkpoint import TensorSpec
from bigmerge.checkpoints.dtypes import byte_count, itemsize, torch_dtype
from bigmerge.storage.buffers import allocate
from bigmerge.storage.inputs import InputFiles
from bigmerge.storage.reading import buffer_bytes

with warnings.catch_warnings():
    # torch warns once that mapped input is read-only; nothing here ever writes to it.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


@dataclass(frozen=True)
class Window:
    """Elements `first` to `first + count` of one input tensor, in memory until its reader releases it.

    Attributes:
        raw: the stored bytes, to be read only.
    """

    spec: TensorSpec
    first: int
    count: int
    raw: memoryview

    def tensor(self) -> torch.Tensor:
        """The window as a read-only 1-D tensor of the stored dtype."""
        dtype = torch_dtype(self.spec.dtype)
        if (self.spec.start + byte_count(self.spec.dtype, self.first)) % itemsize(self.spec.dtype):
            return torch.frombuffer(bytearray(self.raw), dtype=dtype)  # a header that was not padded
        return torch.frombuffer(self.raw, dtype=dtype)

    def part(self, first: int, count: int) -> Window:
        """Elements `first` to `first + count` of the tensor, which lie in this window."""
        if first == self.first and count == self.count:
            return self
        start = byte_count(self.spec.dtype, self.first)
        begin, end = (byte_count(self.spec.dtype, element) - start for element in (first, first + count))
        return Window(self.spec, first, count, self.raw[begin:end])


class WindowReader:
    """Reads windows of input tensors into buffers of its own. One for each thread.

    Args:
        files: the input files.
        slots: bytes of the largest window in each slot; as many windows are in memory at the same time.
        pinned: whether the buffers can be copied to a GPU while others are at work.
    """

    def __init__(self, files: InputFiles, slots: Sequence[int], *, pinned: bool = False) -> None:
        self._files = files
        sizes = [buffer_bytes(nbytes, files.io) for nbytes in slots]
        if pinned:
            self._buffers = [
                as_bytes(torch.empty(size, dtype=torch.uint8, pin_memory=True)) for size in sizes
            ]
        else:
            self._buffers = allocate(sizes)

    def read_ahead(self, spec: TensorSpec, first: int, count: int) -> None:
        """Have a window read soon."""
        self._files[spec.path].read_ahead(*_byte_range(spec, first, count))

    def read(self, slot: int, spec: TensorSpec, first: int, count: int) -> Window:
        """Read a window into buffer number `slot`; what was there before is gone.

        Raises:
            CheckpointError: the file has changed or cannot be read.
        """
        raw = self._files[spec.path].read(*_byte_range(spec, first, count), self._buffers[slot])
        return Window(spec, first, count, raw)

    def release(self, window: Window) -> None:
        """Let go of a window. What was made of it is good only after this.

        Raises:
            CheckpointError: the file was truncated while the window was in use.
        """
        self._files[window.spec.path].release(*_byte_range(window.spec, window.first, window.count))


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous 1-D tensor on the host, without a copy."""
    return memoryview(tensor.view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy typing before 3.12


def _byte_range(spec: TensorSpec, first: int, count: int) -> tuple[int, int]:
    """(offset in the file, length) of a window."""
    start = byte_count(spec.dtype, first)
    return spec.start + start, byte_count(spec.dtype, first + count) - start
