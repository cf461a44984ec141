"""bigmerge.json: what a finished output consists of, so that it can be checked later."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigmerge import __version__
from bigmerge.storage.digests import ALGORITHM, digest_file
from bigmerge.storage.writing import write_json

MANIFEST = "bigmerge.json"


def write_manifest(
    directory: Path, *, tensors: Mapping[str, Any], companions: list[str], facts: Mapping[str, Any]
) -> None:
    """Write the manifest of `directory`.

    Args:
        tensors: name → {"digest": …, and what else is known of it}.
        companions: names of the other files, relative to the directory; their digests are taken here.
        facts: what the output is and how it came about.
    """
    write_json(
        directory / MANIFEST,
        {
            "format": 1,
            "bigmerge_version": __version__,
            **facts,
            "digests": ALGORITHM,
            "tensors": tensors,
            "files": {name: digest_file(directory / name) for name in companions},
        },
    )
