"""Looks at the content of a few tensors before the merge: do integers agree, are two names one tensor?"""

from __future__ import annotations

import re
from itertools import groupby

from bigmerge.checkpoints.checkpoint import Checkpoint, TensorSpec
from bigmerge.errors import CheckpointError

_CHUNK = 1 << 22


def same_content(one: TensorSpec, other: TensorSpec) -> bool:
    """Whether two tensors are the same bytes of the same dtype and shape.

    Raises:
        CheckpointError: a file cannot be read.
    """
    if (one.path, one.start) == (other.path, other.start):
        return True
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    try:
        with one.path.open("rb") as left, other.path.open("rb") as right:
            left.seek(one.start)
            right.seek(other.start)
            for position in range(0, one.nbytes, _CHUNK):
                length = min(_CHUNK, one.nbytes - position)
                if left.read(length) != right.read(length):
                    return False
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror})") from error
    return True


def tied_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Names that are second copies of a tensor, each with the name that stands for it.

    Tied are names that share their bytes in the file (PyTorch files do that), and, where config.json says
    `tie_word_embeddings`, matrices of equal content one of which is an embedding.

    Raises:
        CheckpointError: a file cannot be read.
    """
    tied: dict[str, str] = {}

    def place(spec: TensorSpec) -> tuple[str, int, str, tuple[int, ...]]:
        return (str(spec.path), spec.start, spec.dtype, spec.shape)

    specs = [spec for spec in checkpoint.tensors.values() if spec.nbytes]
    for _, same in groupby(sorted(specs, key=place), key=place):
        names = sorted((spec.name for spec in same), key=_representative)
        tied.update(dict.fromkeys(names[1:], names[0]))

    config = checkpoint.config or {}
    text = config.get("text_config")
    if config.get("tie_word_embeddings") or (isinstance(text, dict) and text.get("tie_word_embeddings")):
        matrices = [spec for spec in specs if len(spec.shape) == 2 and spec.name not in tied]
        embeddings = [spec for spec in matrices if _EMBEDDING.search(spec.name)]
        for embedding in sorted(embeddings, key=lambda spec: _representative(spec.name)):
            if embedding.name in tied:
                continue
            for spec in matrices:
                if spec.name != embedding.name and spec.name not in tied and _may_tie(spec, embedding):
                    tied[spec.name] = embedding.name
    return tied


_EMBEDDING = re.compile(r"(embed|\bwte\b|\bshared\b)")
_HEAD = re.compile(r"(lm_head|embed_out|embed_tokens|output|decoder)\.weight$")


def _representative(name: str) -> tuple[int, str]:
    """Sort key that puts the name a tied tensor should keep first: a shared embedding, else an embedding."""
    return (0 if re.search(r"\bshared\b", name) else 1 if _EMBEDDING.search(name) else 2, name)


def _may_tie(spec: TensorSpec, embedding: TensorSpec) -> bool:
    return (
        _HEAD.search(spec.name) is not None
        and (spec.dtype, spec.shape) == (embedding.dtype, embedding.shape)
        and same_content(spec, embedding)
    )
