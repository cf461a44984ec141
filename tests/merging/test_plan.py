"""bigmerge.merging.plan (and recipe): what is known, and refused, before anything is written."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bigmerge
from bigmerge.checkpoints.dtypes import byte_count
from bigmerge.checkpoints.layout import Layout
from bigmerge.errors import AlignmentError, BigmergeError, OutputError, ResourceError, UsageError
from bigmerge.merging import plan as module
from bigmerge.merging.alignment import Merged
from bigmerge.merging.grid import STEP
from bigmerge.merging.plan import Plan
from bigmerge.storage.buffers import ALIGNMENT
from tests.building import write_fisher
from tests.conftest import normal, write_checkpoint

Usage = namedtuple("Usage", "total used free")
SHAPES: dict[str, tuple[int, ...]] = {
    "big": (STEP + 5,),
    "h.weight": (30, 7),
    "h.bias": (30,),
    "s": (),
    "empty": (0, 3),
}


def tensors(seed: int) -> dict[str, torch.Tensor]:
    return {name: normal(shape, seed) for name, shape in SHAPES.items()} | {"ids": torch.arange(5)}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    for number, name in enumerate("ab"):
        write_checkpoint(root / name, tensors(number), config={}, shards=number + 1)
        squares = {key: tensor.square() for key, tensor in tensors(number).items() if key != "ids"}
        write_fisher(root / f"{name}-fisher", squares, model=root / name, sums=name == "a")
    write_checkpoint(root / "base", tensors(7))
    return root


@pytest.fixture
def both(inputs: Path) -> list[Path]:
    return [inputs / "a", inputs / "b"]


@pytest.fixture(autouse=True)
def nothing_is_written(inputs: Path, tmp_path: Path) -> Iterator[None]:
    before = sorted(inputs.rglob("*"))
    yield
    assert sorted(inputs.rglob("*")) == before
    assert list(tmp_path.iterdir()) == []


# -- what is known ------------------------------------------------------------------------------------------


def test_costs(both: list[Path], tmp_path: Path) -> None:
    plan = bigmerge.plan_merge(both, tmp_path / "out")
    size = sum(tensor.nbytes for tensor in tensors(0).values())
    assert plan.read_bytes == 2 * size - 40, "of the integers only the target's is read"
    assert plan.write_bytes == plan.layout.nbytes
    assert plan.write_bytes - size == 4096, "the header fills a page"
    assert plan.transfer_bytes == plan.read_bytes + size
    assert plan.schedule.peak_bytes <= plan.memory == 256 << 20
    assert plan.disk_needed >= plan.write_bytes
    assert plan.measure == ()


def test_fishers_and_base_are_read_too(inputs: Path, tmp_path: Path) -> None:
    named = [inputs / name for name in ("a", "b", "a-fisher", "b-fisher")]
    size = sum(tensor.nbytes for tensor in tensors(0).values())
    floats = size - 40
    plan = bigmerge.plan_merge(named, tmp_path / "out", base=inputs / "base", scale=0.5)
    assert plan.measure == ("fisher",), "b's header has no sums"
    assert plan.read_bytes == 5 * floats + 40 + 2 * floats
    plan = bigmerge.plan_merge(named, tmp_path / "out", parameters={"normalize": "none"})
    assert plan.measure == ()
    assert plan.read_bytes == 4 * floats + 40


def test_steps_cover_every_element_once(both: list[Path], tmp_path: Path) -> None:
    plan = bigmerge.plan_merge(both, tmp_path / "out")
    covered = dict.fromkeys(range(len(plan.tensors)), 0)
    for number in range(plan.step_count):
        step = plan.step(number)
        assert step.number == number
        assert step.start == covered[step.tensor]
        assert 0 < step.count <= STEP
        covered[step.tensor] += step.count
    assert covered == {number: plan.numel(number) for number in covered}
    assert sum(plan.step_bytes(plan.step(n)) for n in range(plan.step_count)) == plan.transfer_bytes
    assert plan.step_count == 2 + 4, "the empty tensor has none"


def test_the_layout_depends_on_names_dtypes_shapes_and_size_alone(inputs: Path, tmp_path: Path) -> None:
    def layout(*sources: Path, **options: Any) -> Layout:
        return bigmerge.plan_merge(sources, tmp_path / "out", shard_size=2000, **options).layout

    known = layout(inputs / "a", inputs / "b")
    assert len(known.shards) == 2
    assert layout(inputs / "b", inputs / "a") == known
    assert layout(inputs / "a", inputs / "b", memory="1GiB", workers=1) == known
    half = layout(inputs / "a", inputs / "b", dtype="bfloat16")
    assert {name: dtype for name, (dtype, _) in half.tensors.items()} == {
        **dict.fromkeys(SHAPES, "BF16"),
        "ids": "I64",
    }


def test_as_json_is_plain_and_complete(inputs: Path, tmp_path: Path) -> None:
    named = [inputs / name for name in ("a", "b", "a-fisher", "b-fisher")]
    plan = bigmerge.plan_merge(named, tmp_path / "out", weights=[0.25, 3], exclude=["h.*"])
    told = json.loads(json.dumps(plan.as_json(), allow_nan=False))
    assert told["merged"] == 3
    assert told["kept"]["h.bias"] == "excluded by 'h.*'"
    assert told["read_bytes"] == plan.read_bytes
    assert told["measuring_pass"] == ["fisher"]
    assert told["files"] == [{"name": "model.safetensors", "bytes": plan.write_bytes, "tensors": 6}]
    assert [model["weight"] for model in told["recipe"]["models"]] == [0.25, 3]
    assert told["recipe"]["models"][0]["fisher"]["fingerprint"].startswith("xxh3:")
    text = plan.describe()
    for part in ("a  λ 0.25", "b  λ 3", "(target)", "3 tensors merged, 3 taken from a", "excluded by 'h.*': h.bias",
                 "measuring pass", "of 256 MiB", str(tmp_path / "out")):  # fmt: skip
        assert part in text


def test_recipes_are_the_same_for_the_same_merge_alone(inputs: Path, tmp_path: Path) -> None:
    def recipe(*sources: str | Path, **options: Any) -> Any:
        return bigmerge.plan_merge(sources, tmp_path / "out", **options).recipe.describe()

    a, b = inputs / "a", inputs / "b"
    known = recipe(a, b)
    assert recipe(str(a) + "/", b, memory="1GiB", workers=1) == known
    others = [
        recipe(b, a), recipe(a, b, weights=[1, 2]), recipe(a, b, target="b"), recipe(a, b, dtype="float16"),
        recipe(a, b, base=inputs / "base"), recipe(a, b, base=inputs / "base", scale=2.0), recipe(a, b, exclude=["s"]),
        recipe(a, b, strict=True), recipe(a, b, merge_heads=True), recipe(a, b, shard_size="1MB"),
        recipe(a, b, parameters={"normalize": False}), recipe(a, inputs / "base"),
    ]  # fmt: skip
    told = [json.dumps(value) for value in [known, *others]]
    assert len(set(told)) == len(told)


# -- the target ---------------------------------------------------------------------------------------------


def test_targets(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(inputs)
    for wanted in ("b", "b/", inputs / "b", "./b", "elsewhere/b"):
        assert bigmerge.plan_merge(["a", "b"], tmp_path / "out", target=str(wanted)).recipe.target == 1
    for wanted in ("c", "a'", ""):
        with pytest.raises(UsageError, match="names none of the models") as caught:
            bigmerge.plan_merge(["a", "b"], tmp_path / "out", target=wanted)
        assert "they are called a, b" in str(caught.value)


# -- how it is carried out ----------------------------------------------------------------------------------


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`place(cold, local)` decides whether inputs are cold and whether the output is on a local disk."""

    def place(cold: bool, local: bool) -> None:
        monkeypatch.setattr("bigmerge.merging.plan.are_cold", lambda paths: cold)
        monkeypatch.setattr("bigmerge.merging.plan.on_local_disk", lambda path: local)

    return place


@pytest.mark.parametrize(
    ("cold", "local", "asked", "io", "direct_output"),
    [
        (True, True, None, "direct", True),
        (True, False, None, "direct", False),
        (False, True, None, "mmap", True),
        (False, False, None, "mmap", False),
        (True, True, "mmap", "mmap", True),
        (True, False, "pread", "pread", False),
        (False, False, "direct", "direct", True),
    ],
)
def test_ways_of_reading_and_writing(
    both: list[Path], tmp_path: Path, place: Callable[..., None],
    cold: bool, local: bool, asked: str | None, io: str, direct_output: bool,
) -> None:  # fmt: skip
    place(cold, local)
    schedule = bigmerge.plan_merge(both, tmp_path / "out", io=asked).schedule
    assert (schedule.io, schedule.direct_output) == (io, direct_output)
    assert schedule.outputs == 1 + direct_output, "one is written while the next is made"
    assert schedule.sets == 1 + (io == "direct"), "one is read while another is worked on"
    assert schedule.window == 1 << 20
    assert schedule.window % schedule.block == 0


def test_cold_inputs_are_read_past_the_cache_in_little_memory_too(
    both: list[Path], tmp_path: Path, place: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    place(True, True)
    schedule = bigmerge.plan_merge(both, tmp_path / "out", memory="64MiB").schedule
    assert (schedule.io, schedule.workers) == ("direct", 2)
    assert schedule.window >= 1 << 18
    least = bigmerge.plan_merge(both, tmp_path / "out", memory="64MiB", io="pread").schedule
    assert least.workers == 2


def test_small_tensors_need_small_buffers(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("small")
    small = [write_checkpoint(root / name, {"w": normal(1000, 0)}) for name in "ab"]
    schedule = bigmerge.plan_merge(small, tmp_path / "out").schedule
    assert schedule.slots == (4000, 4000)
    assert schedule.output_bytes == 4000 + ALIGNMENT, "room to lie as in the file"


@pytest.mark.parametrize("memory", ["44MiB", "48MiB", "64MiB", "96MiB", "1GiB"])
def test_slots_hold_every_window(both: list[Path], tmp_path: Path, memory: str) -> None:
    for io in (None, "mmap", "pread", "direct"):
        plan = bigmerge.plan_merge(both, tmp_path / "out", memory=memory, io=io)
        window = plan.schedule.window
        for number in range(len(plan.tensors)):
            specs = plan.inputs(number)
            assert len(specs) <= len(plan.schedule.slots)
            for spec, slot in zip(specs, plan.schedule.slots, strict=False):
                assert byte_count(spec.dtype, min(window, spec.numel)) <= slot


# -- what is refused ----------------------------------------------------------------------------------------


def test_a_budget_that_cannot_be_kept(both: list[Path], tmp_path: Path) -> None:
    with pytest.raises(
        ResourceError, match=r"needs at least .* of working memory, the budget is 1 MiB"
    ) as caught:
        bigmerge.plan_merge(both, tmp_path / "out", memory="1MiB")
    assert caught.value.exit_code == 5
    assert caught.value.hint is not None
    enough = caught.value.hint.split()[1]
    plan = bigmerge.plan_merge(both, tmp_path / "out", memory=enough)
    assert plan.schedule.peak_bytes <= plan.memory
    with pytest.raises(ResourceError):
        bigmerge.merge(both, tmp_path / "out", memory="1MiB")


def test_less_memory_means_smaller_windows_and_fewer_workers(
    both: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    plans: list[Plan] = []
    with pytest.raises(ResourceError) as caught:
        bigmerge.plan_merge(both, tmp_path / "out", memory=1)
    least = caught.value.data["needed"]
    for memory in (1 << 30, 8 * least, 4 * least, 2 * least, least):
        plans.append(bigmerge.plan_merge(both, tmp_path / "out", memory=memory))
        assert plans[-1].schedule.peak_bytes <= memory
    assert [plan.schedule.workers for plan in plans] == sorted(
        (plan.schedule.workers for plan in plans), reverse=True
    )
    assert plans[0].schedule.workers == 8
    assert plans[-1].schedule.workers == 1


def test_a_disk_that_is_too_small(both: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = bigmerge.plan_merge(both, tmp_path / "out")
    for free, enough in ((plan.disk_needed, True), (plan.disk_needed - 1, False), (0, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(10**12, 0, free))
        if enough:
            assert bigmerge.plan_merge(both, tmp_path / "deep" / "out").disk_free == free
            continue
        for call in (bigmerge.plan_merge, bigmerge.merge):
            with pytest.raises(ResourceError, match=r"the output needs .*, the disk has") as caught:
                call(both, tmp_path / "deep" / "out")
            assert caught.value.data["needed"] == plan.disk_needed
            assert str(tmp_path) in caught.value.message


def test_what_an_unfinished_run_holds_already_counts_as_free(
    both: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = bigmerge.plan_merge(both, tmp_path / "out")
    held = tmp_path / "out.partial"
    held.mkdir()
    (held / "data").write_bytes(bytes(plan.write_bytes))
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: Usage(10**12, 0, plan.disk_needed - plan.write_bytes)
    )
    assert bigmerge.plan_merge(both, tmp_path / "out").disk_needed == plan.disk_needed
    shutil.rmtree(held)
    with pytest.raises(ResourceError):
        bigmerge.plan_merge(both, tmp_path / "out")


def test_an_output_in_the_place_of_an_input(
    inputs: Path, both: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    link = inputs.parent / "link to inputs"
    link.symlink_to(inputs)
    file = inputs / "a" / "model.safetensors"
    try:
        for out in (inputs, inputs / "a", link / "a", file, inputs.parent, inputs / "a" / ".." / "b"):
            with pytest.raises(OutputError, match="would replace an input of the merge") as caught:
                bigmerge.plan_merge(both, out)
            assert str(out) in caught.value.message
            with pytest.raises(OutputError):
                bigmerge.merge(both, out, overwrite=True)
        with pytest.raises(OutputError, match="would replace an input"):
            bigmerge.plan_merge([link / "a", inputs / "b"], inputs / "a")
        with pytest.raises(OutputError, match="would replace an input"):
            bigmerge.plan_merge(both, inputs / "base", base=inputs / "base")
        monkeypatch.setattr(module, "partial_path", lambda out: inputs / "a")
        with pytest.raises(OutputError, match="would replace an input"):
            bigmerge.plan_merge(both, inputs / "out")
    finally:
        link.unlink()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 2.0}, "--scale needs the --base"),
        ({"scale": float("nan")}, "no finite number"),
        ({"base": "base", "scale": float("inf")}, "no finite number"),
        ({"weights": [1, float("nan")]}, "no finite number"),
        ({"weights": [1, -1]}, "sum to zero"),
        ({"weights": [1]}, "1 --weight for 2 models"),
        ({"workers": 0}, "0 workers cannot work"),
        ({"dtype": "int8"}, "no output dtype"),
        ({"dtype": "F4"}, "no output dtype"),
        ({"dtype": "bf16"}, "no output dtype"),
        ({"method": "linaer"}, "no merge method called 'linaer'"),
        ({"parameters": {"normalise": True}}, "has no parameter 'normalise'"),
        ({"parameters": {"normalize": "perhaps"}}, "neither true nor false"),
        ({"method_options": {"fisher": {"zero": "target"}}}, "options of the method 'fisher' were given"),
        ({"memory": "12 parsecs"}, "no amount of memory"),
        ({"memory": -1}, "no amount of memory"),
        ({"shard_size": 0}, "no amount of memory"),
        ({"shard_size": "0.1"}, "no amount of memory"),
        ({"include": ["nothing"]}, "--include 'nothing' matches no tensor"),
        ({"base": "a-fisher"}, "is a Fisher, where a model is wanted"),
        ({"models": ["a-fisher"]}, "is a Fisher, where a model is wanted"),
    ],
)
def test_arguments_without_meaning(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(inputs)
    with pytest.raises(UsageError, match=message) as caught:
        bigmerge.plan_merge(["a", "b"], tmp_path / "out", **options)
    assert caught.value.exit_code == 2


def test_some_fishers_are_not_enough(inputs: Path, tmp_path: Path) -> None:
    some = [inputs / "a", inputs / "b", inputs / "b-fisher"]
    with pytest.raises(
        UsageError, match="some models have a Fisher and others none: a; the arguments"
    ) as caught:
        bigmerge.plan_merge(some, tmp_path / "out")
    assert "b: 2 file(s), Fisher" in caught.value.message
    assert bigmerge.plan_merge(some, tmp_path / "out", method="linear").recipe.method.name == "linear"
    with pytest.raises(AlignmentError, match="there is none for: a"):
        bigmerge.plan_merge(some, tmp_path / "out", method="fisher")


def test_one_path_is_no_list(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a list of paths"):
        bigmerge.plan_merge(str(inputs / "a"), tmp_path / "out")


def test_every_refusal_is_one_of_ours_and_has_an_exit_code(inputs: Path, tmp_path: Path) -> None:
    for arguments in ([], [tmp_path], [inputs / "a", tmp_path / "x"], [inputs / "a" / "config.json"] * 2):
        with pytest.raises(BigmergeError) as caught:
            bigmerge.plan_merge(arguments, tmp_path / "out")
        assert caught.value.exit_code in {2, 3}


def test_float64_is_computed_in_float64(inputs: Path, tmp_path: Path) -> None:
    plan = bigmerge.plan_merge([inputs / "a", inputs / "b"], tmp_path / "out")
    entry = next(entry for entry in plan.tensors if isinstance(entry, Merged))
    assert entry.compute_dtype == "F32"
