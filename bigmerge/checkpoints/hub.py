"""Models by their name on the Hugging Face hub, downloaded to its cache."""

from __future__ import annotations

import fnmatch
import logging
import re
from pathlib import Path

from bigmerge.checkpoints.checkpoint import WEIGHT_SUFFIXES
from bigmerge.errors import CheckpointError

log = logging.getLogger("bigmerge.hub")

# The hub's own rule: letters, digits, '-', '_' and '.', none of '-' and '.' at an end or doubled.
_PART = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_]([A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")
_REVISION = re.compile(r"[\w./-]+")
_BESIDE_WEIGHTS = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*"]


def is_hub_name(text: str) -> bool:
    """Whether `text` could be `owner/name` or `owner/name@revision` on the hub, and is no weight file."""
    name, at, revision = text.partition("@")
    parts = name.split("/")
    return (
        len(parts) == 2
        and all(_PART.fullmatch(part) for part in parts)
        and (not at or _REVISION.fullmatch(revision) is not None)
        and not name.endswith(WEIGHT_SUFFIXES)
    )


def download(name: str) -> Path:
    """The local snapshot of the model `owner/name[@revision]`; safetensors weights if there are any.

    Without network, what a past download left in the cache is used.

    Raises:
        CheckpointError: there is no such model, no network and no cached copy, or no access to it.
    """
    from huggingface_hub import HfApi, snapshot_download

    repository, _, revision = name.partition("@")
    # What the hub's client raises depends on its version and that of its HTTP library, so all is caught.
    try:
        info = HfApi().model_info(repository, revision=revision or None)
        files = [file.rfilename for file in info.siblings or []]
        weights = (
            "*.safetensors" if any(fnmatch.fnmatch(file, "*.safetensors") for file in files) else "*.bin"
        )
        return Path(
            snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=[*_BESIDE_WEIGHTS, weights],
                ignore_patterns=["*/*"],
            )
        )
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        try:
            cached = snapshot_download(repository, revision=revision or None, local_files_only=True)
        except Exception:
            raise CheckpointError(
                f"{name}: is neither a path that exists nor a model that could be fetched from the hub ({reason})",
                hint="check the spelling; gated models need `hf auth login`; offline, only the cache is searched",
                name=name,
            ) from error
        log.info("%s: taken from the cache, the hub could not be asked (%s)", name, reason)
        return Path(cached)
