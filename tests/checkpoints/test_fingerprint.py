"""bigmerge.checkpoints.fingerprint: the same for the same weights, however they are stored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bigmerge.checkpoints import fingerprint as module
from bigmerge.checkpoints.checkpoint import open_checkpoint
from bigmerge.checkpoints.fingerprint import fingerprint
from bigmerge.errors import CheckpointError
from tests.conftest import normal, write_checkpoint

TENSORS = {
    "large": normal(10_000, 0),
    "small": normal((3, 5), 1),
    "half": normal(9, 2, torch.bfloat16),
    "scalar": torch.tensor(1.0),
    "empty": torch.empty(0, 2),
}


def of(directory: Path, tensors: dict[str, torch.Tensor], **options: int) -> str:
    return open_checkpoint(write_checkpoint(directory, tensors, **options)).fingerprint()


def test_independent_of_sharding_order_and_container(tmp_path: Path) -> None:
    known = of(tmp_path / "one", TENSORS)
    assert known.startswith("xxh3:")
    assert len(known) == 37
    assert of(tmp_path / "two", TENSORS, shards=2) == known
    assert of(tmp_path / "four", dict(reversed(TENSORS.items())), shards=4) == known
    torch.save(TENSORS, tmp_path / "w.pt")
    assert open_checkpoint(tmp_path / "w.pt").fingerprint() == known
    specs = list(open_checkpoint(tmp_path / "one").tensors.values())
    assert fingerprint(reversed(specs)) == known


@pytest.mark.parametrize("element", [0, 255, 5000, 5255, 9744, 9999])
def test_sees_start_middle_and_end(tmp_path: Path, element: int) -> None:
    known = of(tmp_path / "a", TENSORS)
    changed = TENSORS["large"].clone()
    changed[element] += 1
    assert of(tmp_path / "b", {**TENSORS, "large": changed}) != known


@pytest.mark.parametrize("element", range(15))
def test_sees_all_of_small_tensors(tmp_path: Path, element: int) -> None:
    known = of(tmp_path / "a", TENSORS)
    changed = TENSORS["small"].clone()
    changed.view(-1)[element] += 1
    assert of(tmp_path / "b", {**TENSORS, "small": changed}) != known


def test_sees_names_dtypes_and_shapes(tmp_path: Path) -> None:
    variants = [
        TENSORS,
        {("renamed" if name == "small" else name): tensor for name, tensor in TENSORS.items()},
        {**TENSORS, "small": TENSORS["small"].reshape(5, 3)},
        {**TENSORS, "small": TENSORS["small"].view(torch.int32)},
        {**TENSORS, "empty": torch.empty(2, 0)},
        {**TENSORS, "more": torch.ones(1)},
        {name: tensor for name, tensor in TENSORS.items() if name != "scalar"},
        {**TENSORS, "small": TENSORS["scalar"], "scalar": TENSORS["small"]},
    ]
    found = {of(tmp_path / str(number), variant) for number, variant in enumerate(variants)}
    assert len(found) == len(variants)


def test_of_many_tensors_some_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_SAMPLED", 4)
    tensors = {f"{number:02d}": torch.full((2,), float(number)) for number in range(10)}
    known = of(tmp_path / "a", tensors)
    assert of(tmp_path / "b", {**tensors, "00": torch.ones(2)}) != known  # every third is sampled
    assert of(tmp_path / "c", {**tensors, "01": torch.zeros(2)}) == known
    assert of(tmp_path / "d", {**tensors, "01": torch.zeros(3)}) != known


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "m", TENSORS)
    checkpoint = open_checkpoint(root)
    file = root / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="ends inside tensor"):
        checkpoint.fingerprint()
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        replace(checkpoint).fingerprint()
    assert str(file) in caught.value.message
