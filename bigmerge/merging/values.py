"""Values that must not be written: what is not finite, and what the output dtype cannot hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch

from bigmerge.errors import CheckpointError
from bigmerge.merging.windows import Window


def check_block(name: str, block: torch.Tensor, out: torch.Tensor, windows: Sequence[Window]) -> None:
    """Check that every element of a merged block is finite and fits into the output's dtype.

    Args:
        name: of the tensor.
        block: merged, in the compute dtype.
        out: the same, converted.
        windows: what it was made of.

    Raises:
        CheckpointError: not so; names the input element that is to blame, or the overflow.
    """
    # What is not finite makes the sum so. The narrowest dtypes have no infinity to show an overflow.
    if out.dtype.itemsize > 1 and torch.isfinite(out.sum()):
        return
    low, high = torch.aminmax(block)
    check_limits(name, float(low), float(high), out.dtype, windows)


def check_limits(name: str, low: float, high: float, dtype: torch.dtype, windows: Sequence[Window]) -> None:
    """Check that merged values from `low` to `high` are finite and fit into `dtype`.

    Raises:
        CheckpointError: see `check_block`.
    """
    limit = torch.finfo(dtype).max
    if low >= -limit and high <= limit:  # false for NaN too
        return
    for window in windows:
        _check_input(window)
    _refuse_overflow(name, max(abs(low), abs(high)), dtype)


def check_convertible(name: str, window: Window, dtype: torch.dtype) -> None:
    """Check that an unmerged tensor's window fits into another dtype; infinities stay infinities.

    Raises:
        CheckpointError: a finite value does not fit.
    """
    stored = window.tensor()
    wide = stored.to(torch.float64 if stored.dtype == torch.float64 else torch.float32)
    # Looked at before the conversion: the narrowest dtypes saturate instead of overflowing.
    finite = torch.where(torch.isfinite(wide), wide, torch.zeros_like(wide)).abs()
    if finite.numel() and (largest := float(finite.max())) > torch.finfo(dtype).max:
        _refuse_overflow(name, largest, dtype)


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
