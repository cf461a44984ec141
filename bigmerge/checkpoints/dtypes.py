"""The element types of the safetensors format, and what torch calls them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: bits per element of every dtype name the format knows
BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E4M3FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

_TORCH = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "BOOL": "bool",
}
_FROM_TORCH = {torch_name: name for name, torch_name in _TORCH.items()}

#: real numbers that can be averaged
FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
#: whole numbers and truth values: copied, never averaged
INTEGERS = frozenset({"I64", "I32", "I16", "I8", "U8", "U16", "U32", "U64", "BOOL"})


def byte_count(dtype: str, numel: int) -> int:
    """Bytes of `numel` elements of `dtype`, rounded up to whole bytes."""
    return (BITS[dtype] * numel + 7) // 8


def itemsize(dtype: str) -> int:
    """Bytes of one element of a dtype that torch knows."""
    return BITS[dtype] // 8


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name. Raises KeyError where torch has none."""
    import torch

    value = getattr(torch, _TORCH[name])
    assert isinstance(value, torch.dtype)
    return value


def dtype_name(dtype: torch.dtype | str) -> str:
    """The safetensors name of a torch dtype (or of its name, as in `bfloat16`). Raises KeyError."""
    text = str(dtype).removeprefix("torch.")
    return text if text in BITS else _FROM_TORCH[text]
