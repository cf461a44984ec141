"""bigmerge.verification: whatever is done to a finished output shows."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bigmerge
from bigmerge.checkpoints.checkpoint import open_checkpoint
from bigmerge.errors import CheckpointError
from bigmerge.storage.manifest import MANIFEST
from bigmerge.verification import verify
from tests.conftest import normal, write_checkpoint


def tensors(seed: int) -> dict[str, torch.Tensor]:
    return {f"h.{n}.w": normal((5, 6), seed + n) for n in range(4)} | {
        "s": torch.tensor(1.0),
        "e": torch.empty(0, 2),
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished")
    models = [write_checkpoint(root / name, tensors(seed), config={}) for seed, name in enumerate("ab")]
    bigmerge.merge(models, root / "out", shard_size=242)
    return root / "out"


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def flip(path: Path, position: int, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= bit
    path.write_bytes(content)


def rewrite_manifest(out: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((out / MANIFEST).read_text())
    change(manifest)
    (out / MANIFEST).write_text(json.dumps(manifest))


def test_a_finished_merge_is_as_it_should_be(out: Path) -> None:
    result = verify(out)
    assert result.ok
    assert result.has_manifest
    assert result.tensors == 6
    assert result.nbytes == 4 * 120 + 4
    assert result.as_json() == {
        "path": str(out), "ok": True, "tensors": 6, "bytes": 484, "content_checked": True, "problems": [],
    }  # fmt: skip
    assert "all contents are as the manifest says" in result.describe()
    assert verify(out, workers=1) == result


def test_every_byte_of_data_counts(out: Path) -> None:
    chance = torch.Generator().manual_seed(0)
    for name, spec in open_checkpoint(out).tensors.items():
        if not spec.nbytes:
            continue
        position = spec.start + int(torch.randint(spec.nbytes, (), generator=chance))
        flip(spec.path, position)
        result = verify(out)
        assert result.problems == [f"tensor '{name}' in {spec.path.name} has been changed or is damaged"]
        assert "NOT as it should be" in result.describe()
        flip(spec.path, position)
    assert verify(out).ok


def name_in_manifest(out: Path, name: str) -> None:
    rewrite_manifest(out, lambda manifest: manifest["files"].update({name: "0"}))


def swap_values(out: Path) -> None:
    first, second = sorted(out.glob("model-*"))[:2]
    one, two = load_file(first), load_file(second)
    names = next(iter(one)), next(iter(two))
    one[names[0]], two[names[1]] = two[names[1]], one[names[0]]
    save_file(one, first), save_file(two, second)


def reshape(out: Path) -> None:
    path = sorted(out.glob("model-*"))[0]
    content = load_file(path)
    save_file(
        {name: value.reshape(-1, 5) if value.numel() == 30 else value for name, value in content.items()},
        path,
    )


def recast(out: Path) -> None:
    path = sorted(out.glob("model-*"))[0]
    save_file({name: value.view(torch.int32) for name, value in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda out: flip(out / "README.md", 100), "README.md has been changed"),
        (lambda out: (out / "config.json").unlink(), "config.json is missing"),
        (lambda out: (out / "config.json").write_text('{"a": 1}'), "config.json has been changed"),
        (lambda out: (out / "model-00002-of-00003.safetensors").unlink(), "1 of 3 weight files are missing"),
        (lambda out: (out / "model.safetensors.index.json").unlink(), None),
        (lambda out: (out / "model.safetensors.index.json").write_text("{"), "cannot be read as JSON"),
        (lambda out: flip(out / "model-00001-of-00003.safetensors", 2), "claims a header of"),
        (lambda out: flip(out / "model-00001-of-00003.safetensors", 8), "no valid JSON object"),
        (lambda out: (out / "model-00001-of-00003.safetensors").write_bytes(
            (out / "model-00001-of-00003.safetensors").read_bytes()[:-1]), "bytes long, but its header describes"),
        (swap_values, "has been changed or is damaged"),
        (reshape, "has been changed or is damaged"),
        (recast, "has been changed or is damaged"),
        (lambda out: (out / MANIFEST).write_text("{"), "cannot be read as JSON"),
        (lambda out: (out / MANIFEST).write_text("{}"), "is no manifest that this version"),
        (lambda out: rewrite_manifest(out, lambda m: m["tensors"].pop("s")), "tensor 's' is not in the manifest"),
        (lambda out: rewrite_manifest(out, lambda m: m["tensors"].update(x={})), "tensor 'x' is missing"),
        (lambda out: rewrite_manifest(out, lambda m: m["tensors"].update(s=3)), "what it says of tensor 's'"),
        (lambda out: rewrite_manifest(out, lambda m: m["tensors"]["s"].pop("digest")), "tensor 's' in"),
        (lambda out: rewrite_manifest(out, lambda m: m.update(files=[])), "is no manifest that this version"),
        (lambda out: name_in_manifest(out, "../a/config.json"), "not in the directory"),
        (lambda out: name_in_manifest(out, "/etc/hosts"), "not in the directory"),
        (lambda out: name_in_manifest(out, "x" * 300), "x cannot be read|x is missing"),
    ],
)  # fmt: skip
def test_damage_shows(out: Path, damage: Callable[[Path], object], expected: str | None) -> None:
    damage(out)
    result = verify(out)
    if expected is None:
        assert result.ok, "the files are numbered, so the index only repeats what is known"
        return
    assert not result.ok
    assert any(re.search(expected, line) for line in result.problems), result.problems
    assert result.as_json()["ok"] is False


def test_all_problems_are_reported(out: Path) -> None:
    (out / "config.json").unlink()
    (out / "README.md").write_text("x")
    specs = open_checkpoint(out).tensors
    for name in ("s", "h.2.w"):
        flip(specs[name].path, specs[name].start)
    assert len(verify(out).problems) == 4


def test_without_manifest_headers_and_index_are_checked(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "m", tensors(0), shards=2)
    for path in (root, root / "model-00001-of-00002.safetensors", root / "model.safetensors.index.json"):
        result = verify(path)
        assert result.ok
        assert not result.has_manifest
        assert "contents could not be compared" in result.describe()
    flip(root / "model-00001-of-00002.safetensors", 9)
    assert not verify(root).ok


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        verify(tmp_path / "nothing")
    assert verify(tmp_path).problems[0].endswith("holds no weights (.safetensors, .bin, .pt, .pth)")
