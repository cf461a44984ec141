"""PyTorch's zip files (`.bin`, `.pt`, `.pth`): where the tensors' bytes lie inside them.

The pickle inside is only ever read with `weights_only=True`, so it can name tensors and plain containers and
nothing that runs. Reading it under fake tensors yields each storage's offset in the file; from there on the
file is memory-mapped like any other.
"""

from __future__ import annotations

import math
import pickle
import struct
import zipfile
from bisect import bisect_right
from pathlib import Path
from typing import Any

from bigmerge.checkpoints.checkpoint import TensorSpec
from bigmerge.checkpoints.dtypes import dtype_name
from bigmerge.errors import CheckpointError

#: keys under which training frameworks nest the weights
_NESTED = ("state_dict", "model_state_dict", "model", "module")
_CONVERT = "load it with transformers and save it again with save_pretrained, which writes safetensors"


def read_pickled(path: Path) -> list[TensorSpec]:
    """The tensors of the state dict in `path`.

    Raises:
        CheckpointError: the file is no zip-format PyTorch file, its pickle asks for more than tensors and
            plain containers, or it holds no flat state dict of contiguous tensors.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    records = _records(path)
    try:
        # mmap: nothing is read; weights_only: nothing but tensors and containers is unpickled.
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        with FakeTensorMode():
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: its pickle holds something other than tensors, which is never loaded",
            hint=_CONVERT,
            file=str(path),
            reason=str(error).splitlines()[0],
        ) from error
    except Exception as error:  # a damaged pickle fails in any way the unpickler's operations can
        reason = str(error).split("\n", 1)[0] or type(error).__name__
        raise CheckpointError(
            f"{path}: cannot be read as a PyTorch file ({reason})", hint=_CONVERT, file=str(path)
        ) from error

    state = _state_dict(loaded, path)
    specs = []
    for name, tensor in state.items():
        if tensor.layout != torch.strided or not tensor.is_contiguous() or tensor.is_neg():
            raise CheckpointError(
                f"{path}: tensor {name!r} is stored sparse, transposed, strided or negated",
                hint="save the state dict again with dense .contiguous() tensors",
                file=str(path),
                tensor=name,
            )
        offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        nbytes = math.prod(tensor.shape) * tensor.element_size()
        start = 0 if nbytes == 0 else _start(offset, tensor)
        if start is None or (nbytes and not _inside(start, start + nbytes, records)):
            raise CheckpointError(
                f"{path}: the bytes of tensor {name!r} cannot be located", hint=_CONVERT, file=str(path)
            )
        try:
            dtype = dtype_name(tensor.dtype)
        except KeyError:
            raise CheckpointError(
                f"{path}: tensor {name!r} has the dtype {tensor.dtype}, which safetensors cannot hold",
                file=str(path),
                tensor=name,
            ) from None
        specs.append(TensorSpec(name, dtype, tuple(tensor.shape), path, start, nbytes))
    return specs


def _records(path: Path) -> list[tuple[int, int]]:
    """Where the records of the zip file begin and end, in order.

    Looked at before torch is: it trusts the sizes, follows offsets into compressed records and crashes on
    mapped big-endian files.
    """
    refused = None
    records = []
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for info in archive.infolist():
                kind = info.filename.rpartition("/")[2]
                if kind == "constants.pkl":
                    refused = "is a TorchScript program, not a state dict"
                    break
                if info.compress_type != zipfile.ZIP_STORED:
                    refused = f"its record {info.filename} is compressed, so it cannot be memory-mapped"
                if kind == "byteorder" and archive.read(info) != b"little":
                    refused = "was written on a big-endian machine"
                file.seek(info.header_offset + 26)
                name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
                start = info.header_offset + 30 + name_bytes + extra_bytes
                records.append((start, start + info.file_size))
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror or error})", file=str(path)
        ) from error
    except Exception:  # zipfile's own error and, on damaged files, a dozen others
        refused = "is no zip-format PyTorch file, or a damaged one (older formats cannot be memory-mapped)"
    if refused:
        raise CheckpointError(f"{path}: {refused}", hint=_CONVERT, file=str(path))
    return sorted(records)


def _inside(start: int, end: int, records: list[tuple[int, int]]) -> bool:
    number = bisect_right(records, (start, math.inf)) - 1
    return number >= 0 and end <= records[number][1]


def _start(offset: Any, tensor: Any) -> int | None:
    return None if offset is None else int(offset) + tensor.storage_offset() * tensor.element_size()


def _state_dict(loaded: Any, path: Path) -> dict[str, Any]:
    import torch

    if isinstance(loaded, dict):
        for key in _NESTED:
            if isinstance(loaded.get(key), dict) and loaded[key]:
                loaded = loaded[key]
                break
    if not isinstance(loaded, dict) or not loaded:
        raise CheckpointError(f"{path}: holds no state dict", hint=_CONVERT, file=str(path))
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            kind = f"no tensor but {type(value).__name__}" if isinstance(name, str) else "not named by text"
            raise CheckpointError(
                f"{path}: entry {name!r} of its state dict is {kind}",
                hint="save the state dict alone, with tensors only",
                file=str(path),
            )
    return loaded
