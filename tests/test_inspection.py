"""bigmerge.inspection: what is said of models and Fishers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bigmerge.errors import CheckpointError
from bigmerge.inspection import inspect_checkpoint
from tests.building import fill_cache, turn_hub_off, write_fisher
from tests.conftest import normal, write_checkpoint

TENSORS = {
    "model.embed.weight": torch.full((4, 2), 0.5),
    "model.layers.2.a": torch.full((3,), 2.0),
    "model.layers.10.a": torch.full((2,), 1.0),
    "model.layers.10.b": torch.zeros(2),
    "ids": torch.arange(3),
}


@pytest.mark.parametrize("shards", [1, 3])
def test_a_model(tmp_path: Path, shards: int) -> None:
    root = write_checkpoint(tmp_path / "m", TENSORS, shards=shards, config={"architectures": ["BertModel"]})
    found = inspect_checkpoint(root)
    told = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert told["kind"] == "model"
    assert told["fisher"] is None
    assert told["layers"] == {}
    assert told["architectures"] == ["BertModel"]
    assert told["parameters"] == 18
    assert told["bytes"] == 15 * 4 + 3 * 8
    assert told["dtypes"] == {"F32": 4, "I64": 1}
    assert len(told["files"]) == shards
    assert told["metadata"] == {"format": "pt"}
    assert told["fingerprint"] == inspect_checkpoint(root).checkpoint.fingerprint()
    assert list(told["tensors"]) == ["ids", *list(TENSORS)[:-1]], "layer 2 before layer 10"
    assert told["tensors"]["ids"]["shape"] == [3]
    text = found.describe(tensors=False)
    assert text.startswith(
        f"{root}: model (BertModel)\n  18 numbers in 5 tensors (4 F32, 1 I64), 84 B in {shards}"
    )
    assert "layers.10" not in text
    assert "model.layers.10.a   F32     [2]" in found.describe(tensors=True)


def test_a_fisher_says_where_its_mass_is(tmp_path: Path) -> None:
    facts = {"labels": "exact", "examples": 4096}
    root = write_fisher(tmp_path / "f", TENSORS, facts=facts, shards=2)
    found = inspect_checkpoint(root)
    told = found.as_json()
    assert told["kind"] == "fisher"
    assert told["fisher"]["examples"] == 4096
    whole = 4.0 + 6.0 + 2.0 + 3.0
    assert {name: layer["share"] for name, layer in told["layers"].items()} == pytest.approx(
        {
            "ids": 3 / whole,
            "model.embed": 4 / whole,
            "model.layers.2": 6 / whole,
            "model.layers.10": 2 / whole,
        }
    )
    assert told["layers"]["model.layers.10"]["mean"] == 0.5
    assert list(told["layers"]) == ["ids", "model.embed", "model.layers.2", "model.layers.10"]
    assert told["metadata"] == {"format": "pt"}, "what is told above is not told twice"
    text = found.describe(tensors=False)
    assert f"{root}: Fisher\n" in text
    assert "  examples: 4096\n" in text
    lines = {line.split()[0]: line for line in text.splitlines() if "%" in line}
    assert lines["model.layers.2"].count("█") == 30
    assert lines["model.layers.10"].count("█") == 10
    assert "40.0%" in lines["model.layers.2"]


def test_fishers_that_say_little(tmp_path: Path) -> None:
    root = write_fisher(tmp_path / "f", {"a": torch.zeros(3)}, sums=False)
    assert inspect_checkpoint(root).layers == {}
    root = write_fisher(tmp_path / "z", {"a": torch.zeros(3)})
    assert inspect_checkpoint(root).layers == {"a": (0.0, 0.0)}
    assert "0.0%" in inspect_checkpoint(root).describe(tensors=False)
    empty = write_checkpoint(tmp_path / "e", {"a": torch.zeros(3)}, metadata={"bigmerge.fisher": "{}"})
    assert "does not say how it was estimated" in inspect_checkpoint(empty).describe(tensors=False)


def test_single_files_and_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_checkpoint(tmp_path / "m", TENSORS, shards=2)
    assert inspect_checkpoint(root / "model-00001-of-00002.safetensors").kind == "model"
    torch.save({"w": normal(3, 0)}, tmp_path / "w.pt")
    assert inspect_checkpoint(tmp_path / "w.pt").parameters == 3
    turn_hub_off(monkeypatch, tmp_path / "hub")
    fill_cache(tmp_path / "hub", "owner/name", TENSORS)
    assert inspect_checkpoint("owner/name").as_json()["path"] == "owner/name"


def test_odd_configs_do_no_harm(tmp_path: Path) -> None:
    for number, architectures in enumerate(["BertModel", 5, [1, None, "X"], {}, None]):
        root = write_checkpoint(tmp_path / str(number), TENSORS, config={"architectures": architectures})
        expected = ["X"] if number == 2 else []
        assert inspect_checkpoint(root).as_json()["architectures"] == expected
        assert inspect_checkpoint(root).describe(tensors=True)


def test_an_empty_file_of_tensors(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "m", {})
    assert inspect_checkpoint(root).describe(tensors=True)
    assert inspect_checkpoint(root).parameters == 0


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        inspect_checkpoint(tmp_path / "nothing")
