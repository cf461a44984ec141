"""Models by their name on the Hugging Face hub, downloaded to its cache."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

from bigmerge.errors import CheckpointError

_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_BESIDE_WEIGHTS = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*"]


def is_hub_name(text: str) -> bool:
    """Whether `text` could be `owner/name` or `owner/name@revision` on the hub."""
    return _NAME.fullmatch(text) is not None


def download(name: str) -> Path:
    """The local snapshot of the model `owner/name[@revision]`; safetensors weights if there are any.

    Raises:
        CheckpointError: there is no such model, no network and no cached copy, or no access to it.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    repository, _, revision = name.partition("@")
    wanted = [*_BESIDE_WEIGHTS, "*.safetensors"]
    try:
        try:
            files = HfApi().list_repo_files(repository, revision=revision or None)
        except (OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError, OSError) as error:
            if isinstance(error, HfHubHTTPError):
                raise
            # No network: whatever a past download left in the cache has to do.
            return Path(snapshot_download(repository, revision=revision or None, local_files_only=True))
        if not any(fnmatch.fnmatch(file, "*.safetensors") for file in files):
            wanted[-1] = "*.bin"
        return Path(
            snapshot_download(
                repository, revision=revision or None, allow_patterns=wanted, ignore_patterns=["*/*"]
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{name}: is neither a path that exists nor a model that could be fetched from the hub "
            f"({str(error).splitlines()[0]})",
            hint="check the spelling; gated models need `hf auth login`; offline, only the cache is searched",
            name=name,
        ) from error
