"""Merges by several processes, local or launched: the same bytes, one error, and a state to go on from."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest

import bigmerge
from bigmerge.errors import CheckpointError, ResourceError
from bigmerge.merging import teamwork, worker
from bigmerge.merging.parts import split
from tests.conftest import file_bytes, normal, write_checkpoint

ROWS = 1 << 20


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for n in range(2):
        tensors = {f"h.{k}.weight": normal(ROWS + k, n * 10 + k).bfloat16() for k in range(6)}
        write_checkpoint(root / f"m{n}", tensors | {"norm": normal(30, n)}, config={"hidden_size": 1})
    return [root / "m0", root / "m1"]


@pytest.fixture(scope="module")
def expected(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "out"
    bigmerge.merge(models, out, shard_size="5MB")
    return file_bytes(out)


@pytest.fixture
def broken(models, tmp_path):
    """Models of which one holds a NaN near its end."""
    path = tmp_path / "broken"
    tensors = {f"h.{k}.weight": normal(ROWS + k, k).bfloat16() for k in range(6)} | {"norm": normal(30, 1)}
    tensors["norm"][3] = float("nan")
    return [models[0], write_checkpoint(path, tensors, config={"hidden_size": 1})]


# -- parts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole_files", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 40])
def test_parts_cover_every_step_once_and_in_order(models, tmp_path, count, whole_files):
    plan = bigmerge.plan_merge(models, tmp_path / "out", shard_size="5MB")
    steps = [number for number in range(plan.step_count) if number != 2]
    parts = split(plan, steps, count, whole_files=whole_files)
    assert len(parts) == count
    assert [number for part in parts for number in part] == steps
    files = [{plan.layout.shard_of[plan.tensors[plan.step(n).tensor].name] for n in part} for part in parts]
    if whole_files:
        assert sum(map(len, files)) == len(set().union(*files)), "no file is shared"
    elif count <= 3:
        sizes = [sum(plan.step_bytes(plan.step(number)) for number in part) for part in parts]
        assert max(sizes) - min(sizes) <= 2 * max(plan.step_bytes(plan.step(n)) for n in steps)
    assert split(plan, [], count, whole_files=whole_files) == [[] for _ in range(count)]


# -- processes of this machine ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_several_processes_make_the_same_bytes(models, expected, tmp_path, monkeypatch, method):
    monkeypatch.setattr(teamwork, "_start_method", lambda plan: method)
    result = bigmerge.merge(models, tmp_path / "out", shard_size="5MB", processes=3, workers=1)
    assert file_bytes(tmp_path / "out") == expected
    assert result.profile.workers == 3
    assert result.profile.moved["read"] == result.bytes_read


def test_an_error_in_one_process_is_the_error_of_all(broken, tmp_path):
    with pytest.raises(CheckpointError, match=r"broken.*'norm' holds nan at element 3"):
        bigmerge.merge(broken, tmp_path / "out", processes=2)
    assert not (tmp_path / "out").exists()


def test_a_process_that_is_killed_says_so_and_the_same_command_goes_on(
    models, expected, tmp_path, monkeypatch
):
    original = worker.Shared.finished

    def die(self, entry, *arguments):
        original(self, entry, *arguments)
        if entry.number == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(teamwork, "_start_method", lambda plan: "fork")
        patch.setattr(worker.Shared, "finished", die)
        with pytest.raises(ResourceError, match=r"was killed \(SIGKILL\)"):
            bigmerge.merge(models, tmp_path / "out", shard_size="5MB", processes=2)
    bigmerge.merge(models, tmp_path / "out", shard_size="5MB", processes=3)
    assert file_bytes(tmp_path / "out") == expected


SLOW = """
import sys, time
from bigmerge.merging import engine, worker
from bigmerge.cli.main import main
engine._COMMIT_SECONDS = 0.05
original = worker.Shared.finished
def finished(self, *arguments):
    original(self, *arguments)
    time.sleep(1.0)
worker.Shared.finished = finished
main(sys.argv[1:])
"""


def slow_merge(models, out):
    arguments = ["merge", *map(str, models), "-o", str(out), "--shard-size", "5MB", "--processes", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments, "--workers", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    journals = out.with_name(out.name + ".partial")
    while sum(path.read_bytes().count(b"\n") for path in journals.glob("journal*")) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_stopping_the_parent_stops_all(models, expected, tmp_path, number):
    process = slow_merge(models, tmp_path / "out")
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=False
    ).stdout.split()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 130, errors
        assert len(re.findall("bigmerge: error: interrupted", errors)) == 1
        assert "Traceback" not in errors
    deadline = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{pid}") for pid in children):
        assert time.monotonic() < deadline, "children must end with their parent"
        time.sleep(0.05)
    assert not (tmp_path / "out").exists()
    bigmerge.merge(models, tmp_path / "out", shard_size="5MB")
    assert file_bytes(tmp_path / "out") == expected


# -- processes that a launcher has started ------------------------------------------------------------------


def launched(*arguments, count=2):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m",
         "bigmerge", "merge", *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def test_launched_processes_make_the_same_bytes(models, expected, tmp_path):
    done = launched(*models, "-o", tmp_path / "out", "--shard-size", "5MB")
    assert done.returncode == 0, done.stderr
    assert file_bytes(tmp_path / "out") == expected
    assert done.stdout.count("tensors merged by linear") == 1
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_an_error_of_a_launched_process_ends_all(broken, tmp_path):
    done = launched(*broken, "-o", tmp_path / "out", "--shard-size", "5MB", "-q")
    assert done.returncode != 0
    assert "'norm' holds nan at element 3" in done.stderr
    assert not (tmp_path / "out").exists()
    done = launched(*broken, "-o", tmp_path / "out2", "--processes", "2")
    assert "leave out --processes" in done.stderr


@pytest.mark.slow
def test_more_launched_processes_than_files_is_said(models, tmp_path):
    done = launched(*models, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "1 of 2 processes have nothing to do; use a smaller --shard-size" in done.stderr
    bigmerge.merge(models, tmp_path / "alone")
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "alone")
