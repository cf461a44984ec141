"""Identifies weights from their headers and a few kilobytes of each tensor.

A fingerprint pairs a Fisher with the model it was measured on and notices inputs that changed between the two
halves of an interrupted run. It does not depend on how the tensors are spread over files. It is no proof of
integrity: only sampled bytes enter it (the manifest of a merge holds digests over all bytes).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import xxhash

from bigmerge.checkpoints.checkpoint import TensorSpec
from bigmerge.errors import CheckpointError

_SAMPLE = 1024  # bytes from each of the start, the middle and the end of a tensor
_MOST_SAMPLED = 4096  # tensors; beyond, evenly spaced ones (a checkpoint of single experts has 50,000)


def fingerprint(specs: Iterable[TensorSpec]) -> str:
    """A 128-bit fingerprint of the tensors, as `xxh3:` and 32 hexadecimal digits.

    Raises:
        CheckpointError: a file is shorter than its header says or cannot be read.
    """
    ordered = sorted(specs, key=lambda spec: spec.name)
    stride = max(1, -(-len(ordered) // _MOST_SAMPLED))
    digest = xxhash.xxh3_128()
    descriptors: dict[Path, int] = {}
    try:
        for number, spec in enumerate(ordered):
            digest.update(f"{spec.name}\0{spec.dtype}\0{spec.shape}\0".encode())
            if number % stride == 0:
                descriptor = descriptors.get(spec.path)
                if descriptor is None:
                    descriptor = descriptors[spec.path] = os.open(spec.path, os.O_RDONLY)
                digest.update(_sample(descriptor, spec))
    except OSError as error:
        raise CheckpointError(f"{error.filename or 'weights'}: cannot be read ({error.strerror})") from error
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    return "xxh3:" + digest.hexdigest()


def _sample(descriptor: int, spec: TensorSpec) -> bytes:
    if spec.nbytes <= 3 * _SAMPLE:
        ranges = [(0, spec.nbytes)]
    else:
        ranges = [(0, _SAMPLE), (spec.nbytes // 2, _SAMPLE), (spec.nbytes - _SAMPLE, _SAMPLE)]
    pieces = [os.pread(descriptor, length, spec.start + offset) for offset, length in ranges]
    if any(len(piece) != length for piece, (_, length) in zip(pieces, ranges, strict=True)):
        raise CheckpointError(
            f"{spec.path}: ends inside tensor {spec.name!r}", file=str(spec.path), tensor=spec.name
        )
    return b"".join(pieces)
