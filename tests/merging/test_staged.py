"""Arithmetic through buffers on a device: the host's bytes on a CPU, and on a GPU where there is one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bigmerge.errors import CheckpointError, UsageError
from bigmerge.merging.api import execute_plan, plan_merge
from tests.conftest import file_bytes, normal, read_checkpoint, write_checkpoint

SHAPES = {"big.weight": (1 << 20, 3), "h.weight": (64, 65), "norm": (30,), "scalar": ()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for n in range(3):
        tensors = {name: normal(shape, n * 10 + k) for k, (name, shape) in enumerate(SHAPES.items())}
        stored = {name: value.bfloat16() for name, value in tensors.items()}
        write_checkpoint(root / f"m{n}", stored | {"ids": torch.arange(5)})
        write_checkpoint(root / f"m{n}-fisher", {name: value.square() for name, value in tensors.items()})
    return sorted(root.iterdir())


def staged(plan, io="pread", depth=3):
    """The same plan, its arithmetic through buffers."""
    sets = 1 + depth + (io == "direct")
    outputs = 1 + depth + plan.schedule.direct_output
    window = plan.schedule.block
    schedule = dataclasses.replace(
        plan.schedule, io=io, window=window, depth=depth, sets=sets, outputs=outputs
    )
    return dataclasses.replace(plan, schedule=schedule)


@pytest.mark.parametrize("io", ["mmap", "pread", "direct"])
@pytest.mark.parametrize("method", ["linear", "fisher"])
def test_the_same_bytes_as_on_the_host(sources, tmp_path, method, io):
    options = {"method": method, "dtype": "float16", "base": sources[4], "scale": 0.5}
    execute_plan(plan_merge(sources, tmp_path / "host", **options))
    execute_plan(staged(plan_merge(sources, tmp_path / "staged", **options), io, depth=2))
    assert file_bytes(tmp_path / "staged") == file_bytes(tmp_path / "host")


@pytest.mark.parametrize(
    ("value", "fisher", "message"),
    [
        (float("nan"), 1.0, "'norm' holds nan at element 7"),
        (1e38, 1.0, "does not fit into float16"),
        (0.0, -1.0, "of a fisher has a negative element"),
    ],
)
def test_the_same_refusals(tmp_path, value, fisher, message):
    for n in range(2):
        weights, squares = normal((100,), n), normal((100,), n).square()
        weights[7], squares[7] = (value, fisher) if n else (weights[7], squares[7])
        write_checkpoint(tmp_path / f"m{n}", {"norm": weights})
        write_checkpoint(tmp_path / f"m{n}-fisher", {"norm": squares})
    sources = sorted(tmp_path.iterdir())
    plan = plan_merge(
        sources, tmp_path / "out", method="fisher", dtype="float16", parameters={"normalize": "none"}
    )
    for carried_out in (plan, staged(plan)):
        with pytest.raises(CheckpointError, match=message):
            execute_plan(carried_out)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["cuda:99", "meta", "nonsense"])
def test_devices_that_are_not_there(sources, tmp_path, device):
    with pytest.raises(UsageError, match=r"device|usable|supported"):
        plan_merge(sources, tmp_path / "out", device=device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["linear", "fisher"])
def test_on_a_gpu(sources, tmp_path, method):
    execute_plan(plan_merge(sources, tmp_path / "host", method=method, dtype="float32"))
    execute_plan(plan_merge(sources, tmp_path / "gpu", method=method, dtype="float32", device="cuda"))
    host, gpu = read_checkpoint(tmp_path / "host"), read_checkpoint(tmp_path / "gpu")
    for name, tensor in host.items():
        torch.testing.assert_close(gpu[name], tensor, rtol=1e-6, atol=1e-7)
