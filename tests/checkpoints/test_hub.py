"""bigmerge.checkpoints.hub: names, and the local cache when there is no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from bigmerge.checkpoints.checkpoint import open_checkpoint
from bigmerge.checkpoints.hub import download, is_hub_name
from bigmerge.errors import CheckpointError
from tests.building import COMMIT, fill_cache, turn_hub_off


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache; the network is off."""
    turn_hub_off(monkeypatch, tmp_path / "hub")
    return tmp_path / "hub"


@pytest.mark.parametrize(
    "name", ["google/bert", "a/b", "org_1/model-1.5_x", "o-r-g/m@main", "o/m@refs/pr/1", "o/v1.0@2f6a"]
)
def test_names(name: str) -> None:
    assert is_hub_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "bert", "a/b/c", "/a/b", "./a", "../a", "a/..", "a/.", "~/model", "a/", "/", "", "a b/c", "a/*",
        "a/model.safetensors", "a/pytorch_model.bin", "a/b.pt", "-a/b", "a/b-", "a/b--c", "a/b@", "名/前",
        "x" * 97 + "/b",
    ],
)  # fmt: skip
def test_what_is_no_name(name: str) -> None:
    assert not is_hub_name(name)


@pytest.mark.parametrize("shards", [1, 2])
def test_the_cache_serves_when_there_is_no_network(cache: Path, shards: int) -> None:
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2)}
    snapshot = fill_cache(cache, "owner/name", tensors, shards=shards)
    found = download("owner/name")
    assert found == snapshot
    assert download(f"owner/name@{COMMIT}") == snapshot
    checkpoint = open_checkpoint(found)
    assert set(checkpoint.tensors) == {"a", "b"}
    assert checkpoint.config == {"model_type": "x"}


def test_neither_network_nor_cache(cache: Path) -> None:
    for name in ("owner/nothing", "owner/name@other"):
        with pytest.raises(CheckpointError, match="neither a path that exists nor a model") as caught:
            download(name)
        assert caught.value.message.startswith(f"{name}: ")
        assert "Name or service not known" in caught.value.message
        assert "second line" not in caught.value.message
        assert "offline, only the cache is searched" in str(caught.value)


@pytest.mark.parametrize(
    ("files", "pattern"),
    [(["config.json", "model.safetensors", "pytorch_model.bin"], "*.safetensors"), (["pytorch_model.bin"], "*.bin")],
)  # fmt: skip
def test_safetensors_are_preferred(
    cache: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], pattern: str
) -> None:
    asked: dict[str, Any] = {}

    def model_info(self: object, repository: str, *, revision: str | None) -> Any:
        siblings = [huggingface_hub.hf_api.RepoSibling(rfilename=file) for file in files]
        return huggingface_hub.ModelInfo(id=repository, siblings=[vars(one) for one in siblings])

    def snapshot_download(repository: str, **options: Any) -> str:
        asked.update(options, repository=repository)
        return str(cache)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert download("o/m@v2") == cache
    assert (asked["repository"], asked["revision"]) == ("o/m", "v2")
    allowed = asked["allow_patterns"]
    assert [name for name in allowed if name.endswith((".safetensors", ".bin"))] == [pattern]
