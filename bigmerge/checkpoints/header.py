"""The header of a safetensors file: read with every claim checked, and written.

Format (safetensors specification): 8 bytes little-endian header length, a JSON object, then the data. The
object maps a tensor's name to its dtype, shape and the offsets of its bytes relative to the data's start, and
`__metadata__` to a string-to-string map. The tensors' byte ranges must cover the data without gap or overlap.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from bigmerge.checkpoints.dtypes import BITS, byte_count
from bigmerge.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
METADATA_KEY = "__metadata__"
_PAGE = 4096
_shorten = reprlib.Repr()  # what a hostile header holds can be megabytes long
_shorten.maxstring, _shorten.maxlist, _shorten.maxdict, _shorten.maxother = 200, 8, 4, 80


@dataclass(frozen=True)
class Entry:
    """One tensor as its header describes it; `start` is in bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """All that one safetensors file says of itself."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of `path`; no tensor data is touched.

    Raises:
        CheckpointError: the file cannot be read or its header is not valid; the message names the tensor.
    """

    def refuse(what: str, **data: Any) -> NoReturn:
        raise CheckpointError(
            f"{path}: {what}",
            hint="the file is damaged, incomplete or no safetensors file; fetch or write it again",
            file=str(path),
            **data,
        )

    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                refuse(f"is {size} bytes long, too short for a safetensors header")
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER_BYTES:
                refuse(f"claims a header of {length} bytes, the limit is {MAX_HEADER_BYTES}")
            if length > size - 8:
                refuse(f"claims a header of {length} bytes but is only {size} bytes long")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror or error})", file=str(path)
        ) from error

    try:
        if not raw.startswith(b"{"):
            raise ValueError("it does not start with '{'")
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        refuse(f"has a header that is no valid JSON object ({error})")

    metadata = parsed.pop(METADATA_KEY, None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        refuse(f"has a {METADATA_KEY} that is no map from strings to strings")

    data_start = 8 + length
    entries: dict[str, Entry] = {}
    for name, raw_entry in parsed.items():
        problem = _problem(raw_entry)
        if problem:
            refuse(f"tensor {_shorten.repr(name)} {problem}", tensor=name)
        begin, end = raw_entry["data_offsets"]
        shape = tuple(raw_entry["shape"])
        entries[name] = Entry(raw_entry["dtype"], shape, data_start + begin, end - begin)

    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != position:
            kind = "overlaps another tensor" if entry.start < position else "leaves a gap before it"
            refuse(
                f"tensor {_shorten.repr(name)} {kind}: its data starts at byte {entry.start}, expected {position}",
                tensor=name,
            )
        position += entry.nbytes
    if position != size:
        refuse(f"is {size} bytes long, but its header describes {position} bytes")
    return Header(entries, metadata)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are different and can be written again."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {_shorten.repr(key)} appears twice")
        if not is_text(key) or (isinstance(value, str) and not is_text(value)):
            raise ValueError(f"{_shorten.repr(key)} holds half of a surrogate pair, which is no character")
        result[key] = value
    return result


def is_text(text: str) -> bool:
    """Whether `text` is made of characters alone; JSON and pickles can also hold lone surrogates."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def _problem(raw: Any) -> str | None:
    """What is wrong with one tensor's header entry, taken alone."""
    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        return "is not described by exactly dtype, shape and data_offsets"
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        return f"has the unknown dtype {_shorten.repr(dtype)}"
    if not _whole_numbers(shape):
        return f"has the shape {_shorten.repr(shape)}, which is no list of whole numbers"
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"has the data_offsets {_shorten.repr(offsets)}, which are no begin and end"
    numel = _numel(shape)
    if numel is None:
        return f"has the shape {_shorten.repr(shape)}, which is larger than any file"
    expected = byte_count(dtype, numel)
    if offsets[1] - offsets[0] != expected:
        return f"has {offsets[1] - offsets[0]} bytes of data, but {dtype} {_shorten.repr(shape)} needs {expected}"
    return None


def _numel(shape: list[int]) -> int | None:
    """The product of `shape`; None beyond 2^63, so that a hostile shape costs no long arithmetic."""
    if 0 in shape:
        return 0
    numel = 1
    for size in shape:
        numel *= size
        if numel >= 2**63:
            return None
    return numel


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**63 for item in value
    )


def build_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The bytes before the data of a file that holds `tensors` (name → dtype, shape) in the given order.

    The header is padded with spaces so that the data starts at a page: aligned for arithmetic on the mapped file,
    and for reads and writes past the page cache.
    """
    described: dict[str, Any] = {METADATA_KEY: dict(metadata)} if metadata else {}
    position = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = byte_count(dtype, math.prod(shape))
        described[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [position, position + nbytes],
        }
        position += nbytes
    raw = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-(8 + len(raw)) % _PAGE)
    return struct.pack("<Q", len(raw)) + raw
