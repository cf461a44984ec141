"""The plan's promise: the peak of a fresh process above the interpreter with torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bigmerge.merging.api import plan_merge
from tests.conftest import normal, write_checkpoint

ROWS = 6000
COLUMNS = 8000  # one matrix of 48 M elements: 96 MiB in bfloat16, 192 MiB as a float32 Fisher


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    row = normal(COLUMNS * 100, 0)
    for n in range(3):
        values = (row + n).repeat(ROWS // 100).view(ROWS, COLUMNS)
        write_checkpoint(root / f"m{n}", {"big": values.bfloat16(), "small": normal(100, n)})
        write_checkpoint(root / f"m{n}-fisher", {"big": values.square(), "small": normal(100, n).square()})
    return root


def peak(arguments):
    """Peak resident bytes of a Python process with these arguments."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return usage.ru_maxrss * 1024


@pytest.mark.parametrize(
    ("names", "memory", "io"),
    [
        (["m0", "m1", "m2"], "64MiB", "mmap"),
        (["m0", "m1", "m2"], "64MiB", "direct"),
        (["m0", "m1", "m2", "m0-fisher", "m1-fisher", "m2-fisher"], "96MiB", "pread"),
        (["m0", "m1", "m2", "m0-fisher", "m1-fisher", "m2-fisher"], "256MiB", "mmap"),
        (["m0", "m1", "m2", "m0-fisher", "m1-fisher", "m2-fisher"], "256MiB", "direct"),
    ],
)
def test_peak_memory_stays_under_the_plans_promise(inputs, tmp_path, names, memory, io):
    sources = [inputs / name for name in names]
    plan = plan_merge(sources, tmp_path / "out", memory=memory, io=io)
    read = sum(path.stat().st_size for source in sources for path in source.iterdir())
    assert read > 4 * plan.schedule.peak_bytes, "the models must be much larger than the promise"
    bare = peak(["-c", "import torch, numpy"])
    options = ["-q", "-o", str(tmp_path / "out"), "--memory", memory, "--io", io]
    used = peak(["-m", "bigmerge", "merge", *map(str, sources), *options])
    assert used - bare <= plan.schedule.peak_bytes <= plan.memory
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > ROWS * COLUMNS * 2
