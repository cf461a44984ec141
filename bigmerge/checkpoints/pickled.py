"""PyTorch's zip files (`.bin`, `.pt`, `.pth`): where the tensors' bytes lie inside them.

The pickle inside is only ever read with `weights_only=True`, so it can name tensors and plain containers and
nothing that runs. Reading it under fake tensors yields each storage's offset in the file; from there on the
file is memory-mapped like any other.
"""

from __future__ import annotations

import math
import pickle
import zipfile
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

    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path}: is no zip-format PyTorch file (older formats cannot be memory-mapped)",
            hint=_CONVERT,
            file=str(path),
        )
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
    except (RuntimeError, OSError, EOFError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as a PyTorch file ({error})", file=str(path)
        ) from error

    state = _state_dict(loaded, path)
    size = path.stat().st_size
    specs = []
    for name, tensor in state.items():
        if not tensor.is_contiguous():
            raise CheckpointError(
                f"{path}: tensor {name!r} is stored transposed or strided",
                hint="save the state dict again with .contiguous() tensors",
                file=str(path),
                tensor=name,
            )
        offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        nbytes = math.prod(tensor.shape) * tensor.element_size()
        start = 0 if nbytes == 0 else _start(offset, tensor)
        if start is None or start + nbytes > size:
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


def _start(offset: Any, tensor: Any) -> int | None:
    return None if offset is None else int(offset) + tensor.storage_offset() * tensor.element_size()


def _state_dict(loaded: Any, path: Path) -> dict[str, Any]:
    import torch

    if isinstance(loaded, dict):
        for key in _NESTED:
            if isinstance(loaded.get(key), dict):
                loaded = loaded[key]
                break
    if not isinstance(loaded, dict) or not loaded:
        raise CheckpointError(f"{path}: holds no state dict", hint=_CONVERT, file=str(path))
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{path}: entry {name!r} of its state dict is a {type(value).__name__}, not a tensor",
                hint="save the state dict alone, with tensors only",
                file=str(path),
            )
    return loaded
