"""What most tests need: small checkpoints on disk, and the worked examples."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

Tensors = Mapping[str, torch.Tensor]


@pytest.fixture(scope="session")
def worked() -> dict[str, dict[str, Any]]:
    """The worked examples by id."""
    content = json.loads((Path(__file__).parent / "worked_examples.json").read_text())
    return {example["id"]: example for example in content["examples"]}


def write_checkpoint(
    directory: Path,
    tensors: Tensors,
    *,
    shards: int = 1,
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write `tensors` with the safetensors library, spread round-robin over `shards` files."""
    directory.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    header = {"format": "pt", **(metadata or {})}
    if shards == 1:
        save_file(dict(tensors), directory / "model.safetensors", metadata=header)
    else:
        weight_map = {}
        for number in range(shards):
            filename = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: tensors[name] for name in names[number::shards]}
            save_file(part, directory / filename, metadata=header)
            weight_map |= dict.fromkeys(part, filename)
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def read_checkpoint(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory, read by the safetensors library."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def file_bytes(directory: Path) -> dict[str, bytes]:
    """The content of every file of a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """`checkpoint(name, tensors, ...)` writes `tmp_path/name`; see `write_checkpoint`."""

    def write(name: str, tensors: Tensors, **options: Any) -> Path:
        return write_checkpoint(tmp_path / name, tensors, **options)

    return write


def normal(shape: tuple[int, ...] | int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal numbers that depend on `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)
