"""What must hold of every file from a stranger: one function for each way in.

The hypothesis tests and the coverage-guided fuzzer (`python -m tests.fuzzing`) call the same functions.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import safetensors

import bigmerge
from bigmerge.checkpoints.arguments import open_arguments
from bigmerge.checkpoints.checkpoint import Checkpoint, open_checkpoint
from bigmerge.checkpoints.header import build_header, read_header
from bigmerge.verification import verify
from tests.fuzzing.guard import guarded

#: outside of every hostile checkpoint, and worth reaching
OUTSIDE = "outside.safetensors"


def prepare(root: Path) -> None:
    """Put a valid weight file where no checkpoint of `root` may look, and import what is imported when needed."""
    content = build_header({"outside": ("F32", (1,))}, {}) + bytes(4)
    (root / OUTSIDE).write_bytes(content)
    files = {"model.safetensors": content, "config.json": b"{}"}
    check_index(root, files)
    with_a_model = root / "warm"
    _write(with_a_model, files)
    bigmerge.merge([with_a_model, with_a_model], root / "warm-out")
    shutil.rmtree(with_a_model)
    shutil.rmtree(root / "warm-out")


def check_header(root: Path, raw: bytes) -> bool:
    """One safetensors file. Whether it was accepted; then the reference implementation sees the same in it."""
    path = root / "file.safetensors"
    path.write_bytes(raw)
    read = None
    with guarded(path):
        read = read_header(path)
    if read is None:
        return False
    seen = dict(safetensors.deserialize(raw))
    assert set(read.entries) == set(seen)
    for name, entry in read.entries.items():
        assert list(entry.shape) == seen[name]["shape"]
        assert entry.dtype == seen[name]["dtype"]
        assert raw[entry.start : entry.start + entry.nbytes] == bytes(seen[name]["data"])
    return True


def check_index(root: Path, files: Mapping[str, bytes]) -> bool:
    """A directory of weights, index and configuration, opened as a whole and file by file.

    Whether it was accepted as a whole. Every tensor that is found lies within one of `files`.
    """
    directory = root / "checkpoint"
    _write(directory, files)
    whole: Checkpoint | None = None
    with guarded(directory):
        whole = open_checkpoint(directory)
        assert whole.config is None or isinstance(whole.config, dict)
        assert whole.fingerprint()
    with guarded(directory):
        for named in open_arguments(sorted(directory.iterdir()))[0]:
            _check_places(directory, files, named.checkpoint)
    if whole is not None:
        _check_places(directory, files, whole)
    return whole is not None


def check_merge(root: Path, files: Mapping[str, bytes]) -> bool:
    """The checkpoint merged with itself. Whether it was accepted; then the output is whole and is read back."""
    directory, out, partial = root / "checkpoint", root / "merged", root / "merged.partial"
    for left_behind in (out, partial):
        shutil.rmtree(left_behind, ignore_errors=True)
    _write(directory, files)
    done = False
    with guarded(directory, out, partial):
        bigmerge.merge([directory, directory], out, workers=1, memory="64MiB")
        done = True
    assert out.exists() == done
    if done:
        assert verify(out).ok
    return done


def _check_places(directory: Path, files: Mapping[str, bytes], checkpoint: Checkpoint) -> None:
    for spec in checkpoint.tensors.values():
        assert spec.path.parent == directory
        assert 8 <= spec.start <= spec.start + spec.nbytes <= len(files[spec.path.name])


def _write(directory: Path, files: Mapping[str, bytes]) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_bytes(content)
