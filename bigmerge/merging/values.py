"""Values that must not be written: what is not finite, and what the output dtype cannot hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch

from bigmerge.errors import CheckpointError
from bigmerge.merging.windows import Window


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous 1-D tensor, without a copy."""
    return memoryview(tensor.view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy typing before 3.12


def check_block(name: str, block: torch.Tensor, dtype: torch.dtype, windows: Sequence[Window]) -> None:
    """Check that every element of a merged block is finite and fits into the output's `dtype`.

    Raises:
        CheckpointError: not so; names the input element that is to blame, or the overflow.
    """
    limit = torch.finfo(dtype).max
    low, high = torch.aminmax(block)
    if low >= -limit and high <= limit:  # false for NaN too
        return
    for window in windows:
        _check_input(window)
    _refuse_overflow(name, max(abs(float(low)), abs(float(high))), dtype)


def convert(name: str, window: Window, dtype: torch.dtype) -> torch.Tensor:
    """An unmerged tensor's window in another dtype; infinities of the input stay infinities.

    Raises:
        CheckpointError: a finite value does not fit.
    """
    stored = window.tensor()
    wide = stored.to(torch.float64 if stored.dtype == torch.float64 else torch.float32)
    # Looked at before the conversion: the narrowest dtypes saturate instead of overflowing.
    finite = torch.where(torch.isfinite(wide), wide, torch.zeros_like(wide)).abs()
    if finite.numel() and (largest := float(finite.max())) > torch.finfo(dtype).max:
        _refuse_overflow(name, largest, dtype)
    return stored.to(dtype)


def _check_input(window: Window) -> None:
    wide = torch.float64 if window.spec.dtype == "F64" else torch.float32
    bad = ~torch.isfinite(window.tensor().to(wide))
    if bad.any():
        position = window.first + int(bad.nonzero()[0])
        value = float(window.tensor()[position - window.first])
        raise CheckpointError(
            f"{window.spec.path}: tensor {window.spec.name!r} holds {value} at element {position}",
            hint="a model with such values is damaged; --exclude keeps the target's tensor as it is",
            file=str(window.spec.path),
            tensor=window.spec.name,
            element=position,
        )


def _refuse_overflow(name: str, value: float, dtype: torch.dtype) -> NoReturn:
    raise CheckpointError(
        f"tensor {name!r}: the value {value:.6g} does not fit into {str(dtype).removeprefix('torch.')} "
        f"(largest: {torch.finfo(dtype).max:.6g})",
        hint="choose a wider output with --dtype, such as bfloat16 or float32",
        tensor=name,
    )
