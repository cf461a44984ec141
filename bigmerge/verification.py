"""`bigmerge verify`: are the files of a checkpoint whole, complete, and what their manifest says?"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigmerge.checkpoints.checkpoint import TensorSpec, open_checkpoint, read_json_object
from bigmerge.errors import CheckpointError
from bigmerge.progress import progress_bar
from bigmerge.quantities import format_bytes
from bigmerge.storage.digests import digest_file, digest_stored_tensor
from bigmerge.storage.manifest import MANIFEST


@dataclass
class Verification:
    """What was found.

    Attributes:
        problems: one line for everything that is not as it should be.
        has_manifest: whether there are digests to compare the content with.
    """

    path: Path
    tensors: int = 0
    nbytes: int = 0
    has_manifest: bool = False
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "path": str(self.path),
            "ok": self.ok,
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "content_checked": self.has_manifest,
            "problems": self.problems,
        }

    def describe(self) -> str:
        """What is printed for people."""
        what = f"{self.path}: {self.tensors} tensors, {format_bytes(self.nbytes)}"
        if self.problems:
            return "\n".join([f"{what}: NOT as it should be", *(f"  {line}" for line in self.problems)])
        if self.has_manifest:
            return f"{what}: headers, index and all contents are as the manifest says"
        return f"{what}: headers and index are valid; no {MANIFEST}, so contents could not be compared"


def verify(path: Path, *, progress: bool = False, workers: int = 2) -> Verification:
    """Check the checkpoint `path`: header validity, completeness, and digests against the manifest.

    Problems are gathered, not raised.

    Raises:
        CheckpointError: there is nothing at `path`.
    """
    result = Verification(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory", file=str(path))
    try:
        checkpoint = open_checkpoint(path)
        manifest_path = path / MANIFEST if path.is_dir() else path.parent / MANIFEST
        manifest = read_json_object(manifest_path) if path.is_dir() and manifest_path.is_file() else None
    except CheckpointError as error:
        result.problems.append(error.message)
        return result
    result.tensors = len(checkpoint.tensors)
    result.nbytes = checkpoint.nbytes
    if manifest is None:
        return result
    result.has_manifest = True
    recorded = manifest.get("tensors")
    files = manifest.get("files", {})
    if not isinstance(recorded, dict) or not isinstance(files, dict):
        result.problems.append(f"{manifest_path}: is no manifest that this version of bigmerge can read")
        return result
    result.problems += [f"tensor {name!r} is missing" for name in recorded if name not in checkpoint.tensors]
    result.problems += [
        f"tensor {name!r} is not in the manifest" for name in checkpoint.tensors if name not in recorded
    ]
    for name, digest in files.items():
        result.problems += _file_problems(path, name, digest)

    def check(spec: TensorSpec) -> tuple[TensorSpec, str | None]:
        try:
            found = digest_stored_tensor(spec.path, spec.start, spec.dtype, spec.numel)
        except (CheckpointError, OSError) as error:
            return spec, f"tensor {spec.name!r} cannot be read: {error}"
        entry = recorded[spec.name]
        kind = [entry.get("dtype", spec.dtype), entry.get("shape", list(spec.shape))]
        if found != entry.get("digest") or kind != [spec.dtype, list(spec.shape)]:
            return spec, f"tensor {spec.name!r} in {spec.path.name} has been changed or is damaged"
        return spec, None

    result.problems += [
        f"{manifest_path}: what it says of tensor {name!r} cannot be read"
        for name in checkpoint.tensors
        if name in recorded and not isinstance(recorded[name], dict)
    ]
    known = [spec for name, spec in checkpoint.tensors.items() if isinstance(recorded.get(name), dict)]
    total = sum(spec.nbytes for spec in known)
    with (
        progress_bar(total=total, unit="B", desc="verifying", show=progress) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        for spec, problem in pool.map(check, known):
            bar.update(spec.nbytes)
            if problem:
                result.problems.append(problem)
    return result


def _file_problems(directory: Path, name: str, digest: Any) -> list[str]:
    # A manifest is input from strangers: what lies elsewhere is none of its business.
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return [f"the manifest names {name!r}, which is not in the directory"]
    path = directory / name
    try:
        if not path.is_file():
            return [f"{name} is missing"]
        return [] if digest_file(path) == digest else [f"{name} has been changed"]
    except OSError as error:
        return [f"{name} cannot be read ({error.strerror})"]
