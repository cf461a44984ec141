"""bigmerge.merging.sources and arguments: what a list of arguments means."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bigmerge
from bigmerge.checkpoints import arguments
from bigmerge.checkpoints.arguments import locate, resolve, resolve_model
from bigmerge.errors import AlignmentError, CheckpointError, UsageError
from bigmerge.merging.sources import Grouping, collect, group
from bigmerge.verification import verify
from tests.building import fill_cache, turn_hub_off, write_fisher
from tests.conftest import normal, write_checkpoint


def model(seed: int) -> dict[str, torch.Tensor]:
    return {"a.weight": normal((4, 3), seed), "b.weight": normal(5, seed + 100), "c": normal(2, seed + 200)}


def fisher(seed: int) -> dict[str, torch.Tensor]:
    return {name: tensor.square() for name, tensor in model(seed + 1000).items()}


def pairs(grouping: Grouping) -> dict[str, str | None]:
    """Label → name of its Fisher's directory or file."""
    return {
        source.label: source.fisher.root.name if source.fisher is not None else None
        for source in grouping.sources
    }


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory `shards` to fill; the working directory is its parent and the hub is off."""
    directory = tmp_path / "shards"
    directory.mkdir()
    monkeypatch.chdir(tmp_path)
    turn_hub_off(monkeypatch, tmp_path / "hub cache")
    return Path("shards")


def everything(directory: Path) -> list[Path]:
    """What a shell makes of DIRECTORY/*."""
    return sorted(path for path in directory.iterdir() if not path.name.startswith("."))


# -- shards/* -----------------------------------------------------------------------------------------------


def test_model_directories_with_fishers_beside_them(shards: Path) -> None:
    for number, name in enumerate("ab"):
        write_checkpoint(shards / name, model(number), shards=number + 1, config={})
        write_fisher(shards / f"{name}-fisher", fisher(number), model=shards / name, shards=2)
    grouping = group(everything(shards))
    assert pairs(grouping) == {"a": "a-fisher", "b": "b-fisher"}
    assert [source.checkpoint.root for source in grouping.sources] == [shards / "a", shards / "b"]
    assert grouping.skipped == ()
    assert grouping.describe().splitlines() == [
        "a: 1 file(s), Fisher shards/a-fisher",
        "    b: 2 file(s), Fisher shards/b-fisher",
    ]


def test_fishers_of_any_name_find_their_model_by_fingerprint(shards: Path) -> None:
    for number, name in enumerate("ab"):
        write_checkpoint(shards / name, model(number))
    write_fisher(shards / "x", fisher(1), model=shards / "b")
    write_fisher(shards / "b-fisher", fisher(0), model=shards / "a")  # the name says otherwise
    assert pairs(group(everything(shards))) == {"a": "b-fisher", "b": "x"}


@pytest.mark.parametrize("name", ["a-fisher", "a_fisher", "a.fisher", "a-fishers"])
def test_fishers_without_fingerprint_find_their_model_by_name(shards: Path, name: str) -> None:
    for number, label in enumerate("ab"):
        write_checkpoint(shards / label, model(number))
    write_checkpoint(shards / name, fisher(0))  # nothing in its header: another tool's
    assert pairs(group(everything(shards))) == {"a": name, "b": None}


@pytest.mark.parametrize("name", ["a-fisher.safetensors", "a.fisher.safetensors", "a_fisher.pt"])
def test_single_files_beside_each_other(shards: Path, name: str) -> None:
    save_file(model(0), shards / "a.safetensors")
    torch.save(model(1), shards / "b.pt")
    save_file(fisher(0), shards / name) if name.endswith("s") else torch.save(fisher(0), shards / name)
    grouping = group(everything(shards))
    assert pairs(grouping) == {"a": name, "b": None}


def test_numbered_files_of_several_models_side_by_side(shards: Path) -> None:
    for number, name in enumerate(("a", "b", "a-fisher", "b-fisher")):
        tensors = fisher(number) if "fisher" in name else model(number)
        write_checkpoint(shards / "made", tensors, shards=2)
        for file in (1, 2):
            made = shards / "made" / f"model-{file:05d}-of-00002.safetensors"
            made.rename(shards / f"{name}-{file:05d}-of-00002.safetensors")
        shutil.rmtree(shards / "made")
    (shards / "README.md").write_text("hello")
    (shards / "config.json").write_text("{}")
    grouping = group(everything(shards))
    assert {label: name and name[:8] for label, name in pairs(grouping).items()} == {
        "a": "a-fisher",
        "b": "b-fisher",
    }
    assert all(len(source.checkpoint.files) == 2 for source in grouping.sources)
    assert set(grouping.skipped) == {shards / "README.md", shards / "config.json"}
    with pytest.raises(CheckpointError, match="one of 2 shards, but only 1 were found"):
        group([path for path in everything(shards) if "a-00002" not in path.name])


def test_files_that_share_an_index_are_one_model(shards: Path) -> None:
    for number, name in enumerate("ab"):
        parts = list(model(number).items())
        files = {f"{name}.first.safetensors": dict(parts[:1]), f"{name}.rest.safetensors": dict(parts[1:])}
        for file, part in files.items():
            save_file(part, shards / file)
        weight_map = {tensor: file for file, part in files.items() for tensor in part}
        index = shards / f"{name}.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    whole = group(everything(shards))
    assert pairs(whole) == {"a": None, "b": None}
    assert all(set(source.checkpoint.tensors) == set(model(0)) for source in whole.sources)
    files = [path for path in everything(shards) if path.suffix == ".safetensors"]
    assert pairs(group(files)) == pairs(whole), "the index need not be named"
    indexes = [path for path in everything(shards) if path.suffix == ".json"]
    assert pairs(group(indexes)) == pairs(whole), "nor the files"
    with pytest.raises(CheckpointError, match=r"b\.rest\.safetensors is not among the arguments") as caught:
        group(files[:-1])
    assert "name all of them, the index, or their directory" in str(caught.value)
    # An index that cannot be read matters only where it is named.
    (shards / "broken.safetensors.index.json").write_text("{")
    assert pairs(group(files)) == pairs(whole)
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        group(everything(shards))


def test_the_files_of_a_whole_model_directory_are_that_directory(shards: Path) -> None:
    arguments: list[Path] = []
    for number, name in enumerate("ab"):
        write_checkpoint(shards / name, model(number), shards=number + 1, config={"name": name})
        arguments += everything(shards / name)
    grouping = group(arguments)
    assert pairs(grouping) == {"a": None, "b": None}
    assert [source.checkpoint.config for source in grouping.sources] == [{"name": "a"}, {"name": "b"}]


def test_several_models_beside_one_config_are_not_that_directory(shards: Path) -> None:
    for number, name in enumerate("ab"):
        save_file(model(number), shards / f"{name}.safetensors")
    (shards / "config.json").write_text("{}")
    grouping = group(everything(shards))
    assert pairs(grouping) == {"a": None, "b": None}
    assert all(source.checkpoint.config is None for source in grouping.sources)


def test_a_directory_that_has_the_name_of_a_family_is_another_model(shards: Path) -> None:
    write_checkpoint(shards / "a", model(0), config={"of": "the directory"})
    for number, part in enumerate(model(1).items(), start=1):
        save_file(dict([part]), shards / f"a-{number:05d}-of-00003.safetensors")
    grouping = group(everything(shards))
    assert [source.checkpoint.config for source in grouping.sources] == [{"of": "the directory"}, None]
    assert [source.label for source in grouping.sources] == ["shards/a", "shards/a'"]


def test_what_is_no_weights_is_skipped_and_directories_are_mentioned(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(arguments.log, "warning", lambda text, *values: told.append(text % values))
    write_checkpoint(shards / "a", model(0))
    (shards / "logs").mkdir()
    for name in ("config.json", "tokenizer.json", "README.md", "training_args.bin", "optimizer.pt", "logs/x"):
        (shards / name).write_text("no weights")
    grouping = group(everything(shards))
    assert pairs(grouping) == {"a": None}
    assert len(grouping.skipped) == 6
    assert told == ["shards/logs: skipped, it holds no weights"]
    assert "shards/optimizer.pt: skipped, no weights" in grouping.describe()


def test_links_are_called_what_the_user_calls_them(shards: Path) -> None:
    write_checkpoint(shards.parent / "snapshots" / "0f1e2d", model(0))
    (shards / "a").symlink_to((shards.parent / "snapshots" / "0f1e2d").absolute())
    write_checkpoint(shards / "b", model(1))
    write_checkpoint(shards / "a-fisher", fisher(0))
    assert pairs(group(everything(shards))) == {"a": "a-fisher", "b": None}


def test_names_that_are_no_utf8(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate((b"a\xff", b"b")):
        write_checkpoint(shards / os.fsdecode(name), model(number), config={})
    (shards / os.fsdecode(b"a\xff") / os.fsdecode(b"vocab\xff.json")).write_text("{}")
    bigmerge.merge(everything(shards), "out")
    assert json.loads(Path("out/bigmerge.json").read_text(encoding="utf-8"))["recipe"]["target"] == "a\udcff"
    assert "| a\\udcff |" in Path("out/README.md").read_text(encoding="utf-8")
    assert verify(Path("out")).ok
    assert len(list(Path("out").glob("*.json"))) == 3


def test_the_directory_one_is_in(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(shards / "a", model(0))
    write_fisher(shards / "a" / "fisher", fisher(0), model=shards / "a")
    write_checkpoint(shards / "b", model(1))
    monkeypatch.chdir(shards / "a")
    assert pairs(group([".", "../b", "../b/"])) == {"a": "fisher", "shards/b": None, "shards/b'": None}


# -- a Fisher inside ----------------------------------------------------------------------------------------


def test_a_fisher_inside_its_model(shards: Path) -> None:
    write_checkpoint(shards / "a", model(0))
    write_checkpoint(shards / "b", model(1))
    write_checkpoint(shards / "a" / "fisher", fisher(0))
    write_fisher(shards / "b" / "fisher", fisher(1), model=shards / "b")
    (shards / "b" / "fisher" / "notes").mkdir()
    assert pairs(group(everything(shards))) == {"a": "fisher", "b": "fisher"}
    # Named too, it is the same one; and one that is named goes before one that is not.
    named = [shards / "a", shards / "a" / "fisher", shards / "b", shards / "b" / "fisher"]
    assert pairs(group(named)) == {"a": "fisher", "b": "fisher"}
    write_fisher(shards / "other", fisher(2), model=shards / "b")
    assert pairs(group([*everything(shards)])) == {"a": "fisher", "b": "other"}


def test_a_stale_fisher_inside(shards: Path) -> None:
    write_checkpoint(shards / "a", model(0))
    write_fisher(shards / "a" / "fisher", fisher(0), model=shards / "a")
    write_checkpoint(shards / "a", model(5))
    with pytest.raises(
        AlignmentError, match=r"Fisher shards/a/fisher was measured on other weights than 'a'"
    ):
        group([shards / "a"])


def test_an_empty_fisher_directory_is_none(shards: Path) -> None:
    write_checkpoint(shards / "a", model(0))
    (shards / "a" / "fisher").mkdir()
    assert pairs(group([shards / "a"])) == {"a": None}


# -- Fishers that do not fit --------------------------------------------------------------------------------


def test_a_stale_fisher_is_refused(shards: Path) -> None:
    write_checkpoint(shards / "a", model(0))
    write_fisher(shards / "a-fisher", fisher(0), model=shards / "a")
    write_checkpoint(shards / "a", model(7))
    with pytest.raises(AlignmentError, match="was measured on other weights than 'a' has") as caught:
        group(everything(shards))
    assert "--model M --fisher F" in str(caught.value)
    grouping = collect([], [shards / "a", shards / "a"], fishers=[shards / "a-fisher"] * 2)
    assert all(source.fisher is not None for source in grouping.sources), "who names it answers for it"


@pytest.mark.parametrize("recorded", [True, False])
def test_a_fisher_without_model_is_refused(shards: Path, recorded: bool) -> None:
    write_checkpoint(shards / "a", model(0))
    write_checkpoint(shards / "b", model(1))
    write_fisher(shards / "c-fisher", fisher(0), model=shards / "a" if recorded else None)
    with pytest.raises(AlignmentError, match="belongs to none of the models 'b'") as caught:
        group([shards / "b", shards / "c-fisher"])
    assert "shards/c-fisher" in caught.value.message


def test_two_fishers_of_one_model(shards: Path) -> None:
    write_checkpoint(shards / "a", model(0))
    for name in ("a-fisher", "again"):
        write_fisher(shards / name, fisher(0), model=shards / "a")
    with pytest.raises(AlignmentError, match="'a' has two Fishers: shards/a-fisher and shards/again"):
        group(everything(shards))


def test_the_same_weights_twice_are_told_apart_by_name(shards: Path) -> None:
    for name in "ab":
        write_checkpoint(shards / name, model(0))
        write_fisher(shards / f"{name}-fisher", fisher(0), model=shards / name)
    assert pairs(group(everything(shards))) == {"a": "a-fisher", "b": "b-fisher"}


def test_the_same_names_in_two_places(shards: Path) -> None:
    for number, place in enumerate(("x", "y")):
        write_checkpoint(shards / place / "m", model(number))
        write_checkpoint(shards / place / "m-fisher", fisher(number))
    grouping = group([shards / place / name for place in "xy" for name in ("m", "m-fisher")])
    assert pairs(grouping) == {"x/m": "m-fisher", "y/m": "m-fisher"}
    for source in grouping.sources:
        assert source.fisher is not None
        assert source.fisher.root.parent == source.checkpoint.root.parent


# -- names --------------------------------------------------------------------------------------------------


def test_hub_names_from_the_cache(shards: Path) -> None:
    fill_cache(shards.parent / "hub cache", "owner/one", model(0))
    snapshot = fill_cache(shards.parent / "hub cache", "owner/two", model(1), shards=2)
    write_fisher(shards / "two-fisher", fisher(1), model=snapshot)
    grouping = collect(["owner/one", "owner/two@main", shards / "two-fisher"])
    assert pairs(grouping) == {"owner/one": None, "owner/two@main": "two-fisher"}
    assert [source.hub_name for source in grouping.sources] == ["owner/one", "owner/two@main"]
    assert grouping.sources[1].checkpoint.config == {"model_type": "x"}
    named = collect([], ["owner/one", "owner/two"])
    assert [source.label for source in named.sources] == ["owner/one", "owner/two"]


def test_a_hub_name_that_cannot_be_fetched(shards: Path) -> None:
    with pytest.raises(CheckpointError, match="owner/none: is neither a path that exists nor a model"):
        collect(["owner/none", "owner/other"])


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("shards/alhpa", "did you mean shards/alpha?"),
        ("shards/zzz", "shards is a directory here, so the hub was not asked"),
        ("shard/a*", "the pattern matches nothing"),
        ("./shards/alpa", "did you mean shards/alpha?"),
        ("alpha", None),
        ("x" * 5000, None),
        ("shards/alpha.pt", "did you mean shards/alpha?"),
        ("nowhere/model.safetensors", None),
        ("a/b/c", None),
    ],
)
@pytest.mark.parametrize("use", [lambda name: group([name]), resolve, resolve_model, locate])
def test_mistyped_paths(shards: Path, name: str, hint: str | None, use: Callable[[str], object]) -> None:
    write_checkpoint(shards / "alpha", model(0))
    with pytest.raises(CheckpointError, match="no such file or directory") as caught:
        use(name)
    assert caught.value.message.startswith(name)
    assert (caught.value.hint or "").startswith(hint or "")
    assert bool(caught.value.hint) == bool(hint)


def test_a_malformed_argument_is_named(shards: Path) -> None:
    write_checkpoint(shards / "a", model(0))
    (shards / "b.safetensors").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match=r"shards/b\.safetensors: is 4 bytes long"):
        group(everything(shards))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_directory_that_may_not_be_read(shards: Path) -> None:
    (shards / "a").mkdir(mode=0)
    with pytest.raises(CheckpointError, match="cannot be read"):
        group([shards / "a"])


# -- collect ------------------------------------------------------------------------------------------------


def test_positional_and_named_models(shards: Path) -> None:
    for number, name in enumerate("abc"):
        write_checkpoint(shards / name, model(number))
    write_checkpoint(shards / "f", fisher(0))
    save_file(model(4), shards / "file.safetensors")
    grouping = collect(
        [shards / "a"],
        [shards / "b", "shards/c/", shards / "file.safetensors"],
        weights=[1.0, 0.0, -2.5, 3],
        fishers=[shards / "f"] * 3,
    )
    assert pairs(grouping) == {"a": None, "b": "f", "c": "f", "file": "f"}
    assert [source.weight for source in grouping.sources] == [1.0, 0.0, -2.5, 3]
    assert [source.weight for source in collect([shards / "a", shards / "b"]).sources] == [1.0, 1.0]
    twice = collect([shards / "a"], [shards / "a"])
    assert [source.label for source in twice.sources] == ["shards/a", "shards/a'"]


def test_what_is_named_must_be_a_whole_model(shards: Path) -> None:
    write_checkpoint(shards / "a", model(0), shards=2)
    write_fisher(shards / "f", fisher(0))
    (shards / "empty").mkdir()
    index = shards / "a" / "model.safetensors.index.json"
    assert len(resolve_model(index).checkpoint.tensors) == 3
    shard = shards / "a" / "model-00001-of-00002.safetensors"
    with pytest.raises(CheckpointError, match="is one of 2 files of"):
        resolve_model(shard)
    index.unlink()
    with pytest.raises(CheckpointError, match="is one of 2 shards, but only 1"):
        resolve_model(shard)
    with pytest.raises(UsageError, match="shards/f is a Fisher, where a model is wanted"):
        collect([], [shards / "a", shards / "f"])
    with pytest.raises(CheckpointError, match="holds no weights"):
        resolve_model(shards / "empty")
    assert resolve(shard).tensors, "to look at, one shard is enough"


def test_numbers_that_do_not_match(shards: Path) -> None:
    for number, name in enumerate("ab"):
        write_checkpoint(shards / name, model(number))
        write_checkpoint(shards / f"{name}-fisher", fisher(number))
    (shards / "notes.txt").write_text("x")
    both = everything(shards)
    for given in ([], [shards / "a"], [shards / "a", shards / "a-fisher", shards / "notes.txt"]):
        with pytest.raises(UsageError, match="at least two models") as caught:
            collect(given)
        assert caught.value.message.endswith(group(given).describe())
        assert "DIRECTORY/*" in str(caught.value)
    with pytest.raises(UsageError, match=r"3 --weight for 2 models:\s+a: 1 file"):
        collect(both, weights=[1, 2, 3])
    with pytest.raises(UsageError, match="1 --fisher for 2 --model"):
        collect([], [shards / "a", shards / "b"], fishers=[shards / "a-fisher"])
    with pytest.raises(UsageError, match="1 --fisher for 0 --model"):
        collect(both, fishers=[shards / "a-fisher"])
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(UsageError, match="no finite number"):
            collect(both, weights=[1.0, bad])
    with pytest.raises(UsageError, match="a list of paths, not one path"):
        collect(str(shards / "a"))


def test_values_are_where_the_specs_say(shards: Path) -> None:
    write_checkpoint(shards / "a", model(0), shards=3)
    write_checkpoint(shards / "b", model(1))
    for source, root in zip(group(everything(shards)).sources, ("a", "b"), strict=True):
        for spec in source.checkpoint.tensors.values():
            raw = bytearray(spec.path.read_bytes()[spec.start : spec.start + spec.nbytes])
            found = torch.frombuffer(raw, dtype=torch.float32).reshape(spec.shape)
            assert torch.equal(found, load_file(spec.path)[spec.name])
            assert spec.path.parent.name == root
