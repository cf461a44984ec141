"""bigmerge.checkpoints.checkpoint: what a directory, an index or a file turns out to be."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bigmerge.checkpoints.checkpoint import (
    Checkpoint,
    TensorSpec,
    check_complete,
    natural_key,
    open_checkpoint,
    open_files,
    shard_family,
)
from bigmerge.errors import CheckpointError
from tests.conftest import normal, write_checkpoint

TENSORS = {f"layers.{number}.weight": normal((3, number + 1), number) for number in range(12)}


def values(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Every tensor read at the place that its spec names, in float32."""
    found = {}
    for name, spec in checkpoint.tensors.items():
        raw = bytearray(spec.path.read_bytes()[spec.start : spec.start + spec.nbytes])
        found[name] = torch.frombuffer(raw, dtype=torch.float32).reshape(spec.shape)
    return found


def check(checkpoint: Checkpoint, expected: dict[str, torch.Tensor] = TENSORS) -> None:
    found = values(checkpoint)
    assert list(found) == sorted(expected, key=natural_key)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# -- natural order ------------------------------------------------------------------------------------------


def test_natural_order() -> None:
    names = ["h.2.w", "h.10.w", "h.1.w", "a", "h.02.w", "h.b", "10", "9", "h.10.a", "", "x²"]
    ordered = sorted(names, key=natural_key)
    assert ordered == ["", "9", "10", "a", "h.1.w", "h.02.w", "h.2.w", "h.10.a", "h.10.w", "h.b", "x²"]
    for _ in range(20):
        random.shuffle(names)
        assert sorted(names, key=natural_key) == ordered


def test_natural_order_of_a_name_with_more_digits_than_int_takes() -> None:
    long = "1" * 5000
    assert natural_key("w" + long) < natural_key("w2" + long)
    assert natural_key("w9") < natural_key("w" + long)


# -- directories --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_directories_as_transformers_saves_them(tmp_path: Path, shards: int) -> None:
    root = write_checkpoint(tmp_path / "m", TENSORS, shards=shards, config={"a": 1})
    checkpoint = open_checkpoint(root)
    check(checkpoint)
    assert len(checkpoint.files) == shards
    assert checkpoint.root == root
    assert checkpoint.config == {"a": 1}
    assert checkpoint.metadata == {"format": "pt"}
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in TENSORS.values())


def test_numbered_files_without_index(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "m", TENSORS, shards=3)
    (root / "model.safetensors.index.json").unlink()
    check(open_checkpoint(root))


def test_numbers_of_other_widths(tmp_path: Path) -> None:
    for number in (1, 2):
        part = dict(list(TENSORS.items())[number - 1 :: 2])
        save_file(part, tmp_path / f"model-{number:05d}-of-{2:06d}.safetensors")
    check(open_checkpoint(tmp_path))


@pytest.mark.parametrize("name", ["weights.safetensors", "adapter.safetensors", "consolidated.safetensors"])
def test_one_file_of_any_name(tmp_path: Path, name: str) -> None:
    save_file(TENSORS, tmp_path / name)
    check(open_checkpoint(tmp_path))
    check(open_checkpoint(tmp_path / name))


def test_one_index_of_another_name(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "m", TENSORS, shards=2)
    (root / "model.safetensors.index.json").rename(root / "other.safetensors.index.json")
    check(open_checkpoint(root))
    check(open_checkpoint(root / "other.safetensors.index.json"))


def test_the_usual_name_wins_over_others(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "m", TENSORS)
    save_file({"other": torch.ones(1)}, root / "consolidated.safetensors")
    torch.save({"other": torch.ones(1)}, root / "pytorch_model.bin")
    check(open_checkpoint(root))


def test_a_single_file_wins_over_an_index_as_in_transformers(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "m", {"old": torch.ones(2)}, shards=2)
    write_checkpoint(root, TENSORS)
    check(open_checkpoint(root))


def test_bin_directories(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    torch.save({"lr": 1}, tmp_path / "training_args.bin")
    torch.save({"lr": 1}, tmp_path / "optimizer.pt")
    torch.save({"lr": 1}, tmp_path / "rng_state_0.pth")
    check(open_checkpoint(tmp_path))


def test_sharded_bin_with_index(tmp_path: Path) -> None:
    names = list(TENSORS)
    weight_map = {}
    for number in range(2):
        part = {name: TENSORS[name] for name in names[number::2]}
        file = f"pytorch_model-{number + 1:05d}-of-00002.bin"
        torch.save(part, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    check(open_checkpoint(tmp_path))
    index.unlink()
    check(open_checkpoint(tmp_path))


def test_a_bin_model_beside_an_adapter_config_is_a_model(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    (tmp_path / "adapter_config.json").write_text("{}")
    check(open_checkpoint(tmp_path))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_adapters_are_refused_with_what_to_do(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"adapter_model.{suffix}"
    save_file(TENSORS, file) if suffix == "safetensors" else torch.save(TENSORS, file)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="PEFT adapter") as caught:
        open_checkpoint(tmp_path)
    assert "merge_and_unload" in str(caught.value)


def test_several_sets_of_weights_are_refused_by_name(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    save_file(TENSORS, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"several sets of weights: a\.safetensors, b\.safetensors"):
        open_checkpoint(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("hello")
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or directory"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="is no weight file"):
        open_checkpoint(tmp_path / "README.md")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_checkpoint(tmp_path)


# -- shards that are not all there --------------------------------------------------------------------------


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "m", TENSORS, shards=4)
    (root / "model-00003-of-00004.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 4 weight files are missing: model-00003-of-00004"):
        open_checkpoint(root)
    (root / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="one of 4 shards, but only 3 were found") as caught:
        open_checkpoint(root)
    assert caught.value.data["missing"] == [3]
    assert "number 3" in str(caught.value)


def test_a_number_outside_the_set_does_not_stand_in_for_a_missing_one(tmp_path: Path) -> None:
    for number in (1, 3):
        save_file({f"t{number}": torch.ones(1)}, tmp_path / f"model-{number:05d}-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="one of 2 shards, but only 1 were found"):
        open_checkpoint(tmp_path)


def test_shards_of_two_saves_are_told_apart(tmp_path: Path) -> None:
    for count in (2, 3):
        for number in range(count):
            file = tmp_path / f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            save_file({f"t{count}.{number}": torch.ones(1)}, file)
    with pytest.raises(CheckpointError, match=r"model\.safetensors belong to different sets, of 2 and 3"):
        open_checkpoint(tmp_path)


def test_shard_family() -> None:
    assert shard_family(Path("x/model-00002-of-00010.safetensors")) == ("model.safetensors", 2, 10)
    assert shard_family(Path("a-b-00002-of-00010.bin")) == ("a-b.bin", 2, 10)
    assert shard_family(Path("model.safetensors")) is None
    assert shard_family(Path("model-1-of-2.safetensors")) is None
    check_complete([Path("model.safetensors")])
    check_complete([Path("a-00002-of-00002.bin"), Path("a-00001-of-00002.bin")])


# -- hostile indexes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../m/model-00001-of-00002.safetensors", "/etc/passwd", "..", ".", "", "a\0b", "a\\b", "sub/x"]
)
def test_an_index_may_name_only_files_beside_it(tmp_path: Path, name: str) -> None:
    root = write_checkpoint(tmp_path / "m", TENSORS, shards=2)
    index = root / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["layers.0.weight"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="only files in the same directory") as caught:
        open_checkpoint(root)
    assert repr(name) in caught.value.message
    assert str(index) in caught.value.message


def test_an_index_must_be_true(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "m", TENSORS, shards=2)
    index = root / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    good = dict(content["weight_map"])
    for wrong in (
        good | {"not there": "model-00001-of-00002.safetensors"},
        good | {"layers.0.weight": "model-00002-of-00002.safetensors"},
    ):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(CheckpointError, match="but that file does not hold it"):
            open_checkpoint(root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read as JSON"),
        ("[]", "holds no JSON object"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("{}", "no weight_map"),
        ('{"weight_map":[]}', "no weight_map"),
        ('{"weight_map":{"a":1}}', "no weight_map"),
        ('{"weight_map":{"a":"model.gguf"}}', "weight files are missing"),
        ('{"weight_map":{"a":"config.json"}}', "is no weight file"),
        ('{"weight_map":{"a":"\\ud800"}}', "weight files are missing"),
        ('{"weight_map":{"a":"%s"}}' % ("x" * 300), "weight files are missing"),
        ('{"weight_map":{}}', "names no weight files"),
    ],
)
def test_indexes_that_are_none(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in caught.value.message


def test_a_config_that_is_no_object(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "m", TENSORS)
    (root / "config.json").write_text("nothing")
    checkpoint = open_checkpoint(root)
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read as JSON"):
        _ = checkpoint.config


# -- tensors ------------------------------------------------------------------------------------------------


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    for number in (1, 2):
        save_file({"same": torch.ones(1)}, tmp_path / f"model-{number:05d}-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="'same' is in two files") as caught:
        open_checkpoint(tmp_path)
    assert "00001-of-00002" in caught.value.message
    assert "00002-of-00002" in caught.value.message


def test_names_that_could_not_be_written_again_are_refused(tmp_path: Path) -> None:
    for name in ("__metadata__", "a\ud800"):
        path = tmp_path / "w.pt"
        torch.save({name: torch.ones(2)}, path)
        with pytest.raises(CheckpointError, match="cannot be the name of a tensor"):
            open_checkpoint(path)


def test_metadata_of_several_files(tmp_path: Path) -> None:
    files = []
    for number, metadata in enumerate([{"a": "1", "b": "first"}, {"b": "second", "c": "3"}]):
        files.append(tmp_path / f"{number}.safetensors")
        save_file({f"t{number}": torch.ones(1)}, files[-1], metadata=metadata)
    checkpoint = open_files(tmp_path, files)
    assert checkpoint.metadata == {"a": "1", "b": "first", "c": "3"}
    assert checkpoint.file_metadata[files[1]] == {"b": "second", "c": "3"}


def test_specs() -> None:
    spec = TensorSpec("a", "F32", (2, 3), Path("x"), 8, 24)
    assert spec.numel == 6
    assert TensorSpec("a", "F32", (), Path("x"), 8, 4).numel == 1
