"""A checkpoint: where the bytes of every tensor of one model (or one Fisher) are.

Opening reads headers only. Understood are safetensors files, alone or sharded with or without an index, and
PyTorch's zip files (`.bin`, `.pt`, `.pth`).
"""

from __future__ import annotations

import errno
import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from bigmerge.checkpoints.header import METADATA_KEY, is_text, read_header
from bigmerge.errors import CheckpointError

SAFETENSORS_INDEX = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
#: weight-like files that are no model weights
NOT_WEIGHTS = re.compile(
    r"(training_args|optimizer.*|scheduler.*|scaler.*|rng_state.*|.*optim_states)\.(bin|pt|pth)$"
)
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{4,6})-of-(?P<count>\d{4,6})(?P<suffix>\.\w+)$", re.ASCII)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Where one tensor is: `nbytes` bytes from byte `start` of `path`, C-contiguous, little-endian."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one model, in natural order of their names (layer 2 before layer 10).

    Attributes:
        root: the directory, or the only file, that was opened.
        files: the weight files, in order.
        tensors: every tensor by name.
        file_metadata: the `__metadata__` of each file's header.
    """

    root: Path
    files: tuple[Path, ...]
    tensors: dict[str, TensorSpec]
    file_metadata: dict[Path, dict[str, str]] = field(default_factory=dict)

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The metadata of all files; where they disagree, the first file's."""
        merged: dict[str, str] = {}
        for path in self.files:
            for key, value in self.file_metadata.get(path, {}).items():
                merged.setdefault(key, value)
        return merged

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """The parsed config.json beside the weights, if the checkpoint is a directory that has one.

        Raises:
            CheckpointError: it is no JSON object.
        """
        path = self.root / "config.json"
        return read_json_object(path) if self.root.is_dir() and path.is_file() else None

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.tensors.values())

    @cached_property
    def _fingerprint(self) -> str:
        from bigmerge.checkpoints.fingerprint import fingerprint

        return fingerprint(self.tensors.values())

    def fingerprint(self) -> str:
        """Identifies the weights whatever files they lie in; see `bigmerge.checkpoints.fingerprint`."""
        return self._fingerprint


def natural_key(name: str) -> tuple[tuple[int, int, str, str], ...]:
    """Sort key that compares runs of digits as numbers."""
    # By length and digits, not int(): a hostile name can hold more digits than int() takes.
    return tuple(
        (0, len(digits := part.lstrip("0")), digits, part) if part[0] in "0123456789" else (1, 0, part, part)
        for part in re.split(r"([0-9]+)", name)
        if part
    )


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        CheckpointError: the file cannot be read or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})", file=str(path)) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no JSON object", file=str(path))
    return value


def shard_family(path: Path) -> tuple[str, int, int] | None:
    """(family name, shard number, shard count) of a file named like `model-00001-of-00003.safetensors`."""
    match = _NUMBERED.match(path.name)
    if not match:
        return None
    return match["stem"] + match["suffix"], int(match["number"]), int(match["count"])


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a model directory, an index file, or a single weight file.

    Raises:
        CheckpointError: nothing there, several models in one directory, or a malformed file.
    """
    path = Path(path)
    if path.is_dir():
        return _open_directory(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory", file=str(path))
    if path.name.endswith(".index.json"):
        return _open_index(path)
    return open_files(path, [path])


def open_files(root: Path, files: Sequence[Path]) -> Checkpoint:
    """The checkpoint made of exactly `files`.

    Raises:
        CheckpointError: a file is malformed, of unknown kind, or two hold a tensor of the same name.
    """
    tensors: dict[str, TensorSpec] = {}
    metadata: dict[Path, dict[str, str]] = {}
    for path in files:
        if path.suffix == ".safetensors":
            header = read_header(path)
            metadata[path] = header.metadata
            specs: Iterable[TensorSpec] = (
                # interned: every model of a merge has the same names
                TensorSpec(sys.intern(name), entry.dtype, entry.shape, path, entry.start, entry.nbytes)
                for name, entry in header.entries.items()
            )
        elif path.suffix in PICKLE_SUFFIXES:
            from bigmerge.checkpoints.pickled import read_pickled

            specs = read_pickled(path)
        else:
            raise CheckpointError(
                f"{path}: is no weight file",
                hint=f"weight files end in {', '.join(WEIGHT_SUFFIXES)}",
                file=str(path),
            )
        for spec in specs:
            if spec.name == METADATA_KEY or not is_text(spec.name):
                raise CheckpointError(
                    f"{path}: {spec.name!r} cannot be the name of a tensor", file=str(path), tensor=spec.name
                )
            if spec.name in tensors:
                other = tensors[spec.name].path
                raise CheckpointError(
                    f"tensor {spec.name!r} is in two files: {other} and {path}",
                    tensor=spec.name,
                    file=str(path),
                )
            tensors[spec.name] = spec
    ordered = {name: tensors[name] for name in sorted(tensors, key=natural_key)}
    return Checkpoint(root, tuple(files), ordered, metadata)


def _open_index(path: Path) -> Checkpoint:
    index = read_json_object(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{path}: has no weight_map from tensor names to file names", file=str(path))
    if not weight_map:
        raise CheckpointError(f"{path}: its weight_map names no weight files", file=str(path))
    names = sorted(set(weight_map.values()), key=natural_key)
    for name in names:
        # An index is input from strangers: it may only name files that lie beside it.
        if name in {"", ".", ".."} or "/" in name or "\\" in name or "\0" in name:
            raise CheckpointError(
                f"{path}: names the file {name!r}; only files in the same directory are accepted",
                file=str(path),
                named=name,
            )
    missing = [name for name in names if not _is_file(path.parent / name)]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(names)} weight files are missing: {', '.join(missing[:5])}"
            + (" …" if len(missing) > 5 else ""),
            hint="the download or copy is incomplete",
            file=str(path),
            missing=missing,
        )
    checkpoint = open_files(path.parent, [path.parent / name for name in names])
    for tensor, name in weight_map.items():
        spec = checkpoint.tensors.get(tensor)
        if spec is None or spec.path.name != name:
            raise CheckpointError(
                f"{path}: says that tensor {tensor!r} is in {name}, but that file does not hold it",
                file=str(path),
                tensor=tensor,
            )
    return checkpoint


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})", file=str(path)) from error


def _open_directory(directory: Path) -> Checkpoint:
    names = sorted((entry.name for entry in list_directory(directory) if entry.is_file()), key=natural_key)
    for suffix in (".safetensors", ".bin"):
        usual = "model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin"
        indexes = [name for name in names if name.endswith(f"{suffix}.index.json")]
        # In the order of transformers, so that what is merged is what from_pretrained loads.
        if usual in names:
            return open_files(directory, [directory / usual])
        if f"{usual}.index.json" in indexes:
            return _open_index(directory / f"{usual}.index.json")
        if len(indexes) == 1:
            return _open_index(directory / indexes[0])
        suffixes = (suffix,) if suffix == ".safetensors" else PICKLE_SUFFIXES
        weights = [name for name in names if name.endswith(suffixes) and not NOT_WEIGHTS.match(name)]
        if not weights:
            continue
        if "adapter_config.json" in names and all(name.startswith("adapter_model") for name in weights):
            raise CheckpointError(
                f"{directory}: is a PEFT adapter, not a full model",
                hint="merge it into its base model first (peft: merge_and_unload, then save_pretrained)",
                file=str(directory),
            )
        families: dict[str, list[Path]] = {}
        for name in weights:
            family = shard_family(Path(name))
            families.setdefault(family[0] if family else name, []).append(directory / name)
        if len(families) > 1:
            raise CheckpointError(
                f"{directory}: holds several sets of weights: {', '.join(sorted(families))}",
                hint="name the files of the model you mean",
                file=str(directory),
                families=sorted(families),
            )
        files = families.popitem()[1]
        check_complete(files)
        return open_files(directory, files)
    raise CheckpointError(
        f"{directory}: holds no weights ({', '.join(WEIGHT_SUFFIXES)})",
        hint="give a model directory, a weight file or a Hugging Face hub name",
        file=str(directory),
    )


def list_directory(directory: Path) -> list[Path]:
    """What a directory holds.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return list(directory.iterdir())
    except OSError as error:
        raise CheckpointError(
            f"{directory}: cannot be read ({error.strerror})", file=str(directory)
        ) from error


def check_complete(files: Sequence[Path]) -> None:
    """Check that numbered shard files are all there.

    Raises:
        CheckpointError: a number is missing, or the files are of sets of different size.
    """
    numbered = [(path, family) for path in files if (family := shard_family(path))]
    if not numbered:
        return
    path, (name, _, count) = numbered[0]
    counts = sorted({family[2] for _, family in numbered})
    if len(counts) > 1:
        raise CheckpointError(
            f"{path.parent}: the shards of {name} belong to different sets, of {' and '.join(map(str, counts))}",
            hint="remove those that an earlier save left behind, or name the files of the model you mean",
            file=str(path),
            counts=counts,
        )
    have = {family[1] for _, family in numbered}
    lacking = [number for number in range(1, count + 1) if number not in have]
    if lacking:
        raise CheckpointError(
            f"{path}: is one of {count} shards, but only {count - len(lacking)} were found",
            hint=f"missing: number {', '.join(map(str, lacking[:8]))}" + (" …" if len(lacking) > 8 else ""),
            file=str(path),
            missing=lacking,
        )
