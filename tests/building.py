"""What several test modules build: a hub cache without a hub, Fishers with what their headers record."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from bigmerge.checkpoints.checkpoint import open_checkpoint
from bigmerge.checkpoints.fisher_facts import FACTS_KEY, SUMS_KEY
from tests.conftest import Tensors, write_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def fill_cache(cache: Path, name: str, tensors: dict[str, torch.Tensor], *, shards: int = 1) -> Path:
    """What huggingface_hub leaves after downloading the model `name`: links from a snapshot to blobs."""
    root = cache / f"models--{name.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    source = write_checkpoint(root / "made", tensors, shards=shards, config={"model_type": "x"})
    (root / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(source.iterdir())):
        blob = root / "blobs" / f"{number:040x}"
        file.rename(blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    source.rmdir()
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    return snapshot


def turn_hub_off(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """No network, and `cache` as the hub's local cache."""

    def no_network(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("[Errno -2] Name or service not known\nsecond line")  # like httpx, no OSError

    cache.mkdir(exist_ok=True)
    # The environment is read when huggingface_hub is imported, which may have happened long ago.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_network)


def write_fisher(
    directory: Path,
    tensors: Tensors,
    *,
    model: Path | None = None,
    sums: bool = True,
    facts: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Write `tensors` as a Fisher of `model`, with its fingerprint and the tensors' sums in the header."""
    recorded = {"kind": "diagonal", **(facts or {})}
    if model is not None:
        recorded["model_fingerprint"] = open_checkpoint(model).fingerprint()
    metadata = {FACTS_KEY: json.dumps(recorded)}
    if sums:
        moments = {
            name: [float(tensor.double().sum()), float(tensor.double().square().sum())]
            for name, tensor in tensors.items()
        }
        metadata[SUMS_KEY] = json.dumps(moments)
    return write_checkpoint(directory, tensors, metadata=metadata, **options)
