"""Merges that are killed, interrupted or find changed files: what is left, and what the next run makes of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import bigmerge
from bigmerge.errors import BigmergeError, CheckpointError, Interrupted, OutputError, ResumeError
from bigmerge.merging import worker
from tests.building import write_fisher
from tests.conftest import file_bytes, normal, read_checkpoint, write_checkpoint

COUNT = 40_000_000  # elements: 39 steps


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for n in range(2):
        base = normal(1_000_000, n).repeat(COUNT // 2_000_000)
        write_checkpoint(
            root / f"m{n}", {"a": base.bfloat16(), "b": (base * 2).bfloat16()}, config={"hidden_size": 1}
        )
    return [root / "m0", root / "m1"]


@pytest.fixture(scope="module")
def expected(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "out"
    bigmerge.merge(models, out)
    return file_bytes(out)


class Stop(BigmergeError):
    """What the tests raise in place of a crash."""


def fail_after(monkeypatch, steps, error):
    """Make the engine fail when it has written `steps` steps."""
    original = worker.Shared.finished
    count = [0]

    def finished(self, *arguments):
        count[0] += 1
        if count[0] > steps:
            raise error
        original(self, *arguments)

    monkeypatch.setattr(worker.Shared, "finished", finished)


def start(models, out, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "bigmerge", "merge", *map(str, models), "-o", str(out), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def slow_merge(models, out, stall_after=1000):
    """A merge in a process of its own that can be hit in the middle: each step takes 100 ms more.

    After `stall_after` steps it makes no more progress at all.
    """
    code = (
        "import sys, time\n"
        "from bigmerge.merging import engine, worker\n"
        "from bigmerge.cli.main import main\n"
        "engine._COMMIT_SECONDS = 0.05\n"
        "R = worker.Shared\n"
        "old, count = R.finished, [0]\n"
        "def finished(self, *a):\n"
        "    count[0] += 1\n"
        f"    time.sleep(0.1 if count[0] <= {stall_after} else 600); old(self, *a)\n"
        "R.finished = finished\n"
        "main(sys.argv[1:])\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, "merge", *map(str, models), "-o", str(out), "--workers", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_steps(out, count, process):
    partial = out.with_name(out.name + ".partial")
    deadline = time.monotonic() + 60
    while sum(journal.read_bytes().count(b"\n") for journal in partial.glob("journal*")) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("steps", [1, 12, 30])
def test_kill_9_then_the_same_command_gives_the_same_bytes(models, expected, tmp_path, steps):
    out = tmp_path / "out"
    process = slow_merge(models, out, stall_after=steps + 2)
    wait_for_steps(out, steps, process)
    process.kill()
    process.communicate()
    assert not out.exists()
    journal = tmp_path / "out.partial" / "journal-0"
    done = journal.read_bytes().count(b"\n")
    assert done >= steps
    bigmerge.merge(models, out)
    assert file_bytes(out) == expected
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_a_resumable_state_and_say_so(models, expected, tmp_path, number):
    out = tmp_path / "out"
    process = slow_merge(models, out)
    wait_for_steps(out, 3, process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "interrupted with" in stderr
    assert "run the same command again" in stderr
    assert "Traceback" not in stderr
    assert not out.exists()
    done = (tmp_path / "out.partial" / "journal-0").read_bytes().count(b"\n")
    second = start(models, out)
    _, stderr = second.communicate(timeout=120)
    assert second.returncode == 0, stderr
    assert f"going on: {done} of 39 steps" in stderr or f"going on: {done} of 40 steps" in stderr
    assert file_bytes(out) == expected


def test_finished_steps_are_not_done_again(models, expected, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fail_after(patch, 10, Stop("stop"))
        with pytest.raises(Stop):
            bigmerge.merge(models, tmp_path / "out", workers=1)
    merged = []
    original = worker.Shared.finished

    def finished(self, entry, *arguments):
        merged.append(entry.number)
        original(self, entry, *arguments)

    monkeypatch.setattr(worker.Shared, "finished", finished)
    bigmerge.merge(models, tmp_path / "out")
    assert len(merged) == 40 - 10
    assert file_bytes(tmp_path / "out") == expected


def interrupted(models, tmp_path, monkeypatch, **options):
    with monkeypatch.context() as patch:
        fail_after(patch, 10, Stop("stop"))
        with pytest.raises(Stop):
            bigmerge.merge(models, tmp_path / "out", workers=1, **options)
    return tmp_path / "out.partial"


def test_a_torn_journal_costs_only_its_end(models, expected, tmp_path, monkeypatch):
    partial = interrupted(models, tmp_path, monkeypatch)
    journal = partial / "journal-0"
    whole = journal.read_bytes()
    journal.write_bytes(whole[: len(whole) - 17])
    bigmerge.merge(models, tmp_path / "out")
    assert file_bytes(tmp_path / "out") == expected


def test_output_that_is_not_what_the_journal_says_is_made_again(
    models, expected, tmp_path, monkeypatch, caplog
):
    partial = interrupted(models, tmp_path, monkeypatch)
    weights = partial / "output" / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(5_000_000)
        file.write(b"\x01\x02\x03")
    with caplog.at_level("WARNING", logger="bigmerge"):
        bigmerge.merge(models, tmp_path / "out")
    assert "1 steps cannot be trusted" in caplog.text
    assert file_bytes(tmp_path / "out") == expected


def test_another_recipe_is_refused_with_what_differs(models, tmp_path, monkeypatch):
    interrupted(models, tmp_path, monkeypatch)
    before = file_bytes(tmp_path / "out.partial")
    with pytest.raises(ResumeError, match=r"models\[1\]\.weight: 1\.0 before, 2\.0 now"):
        bigmerge.merge(models, tmp_path / "out", weights=[1, 2])
    assert file_bytes(tmp_path / "out.partial") == before


def test_memory_and_workers_may_change_between_runs(models, expected, tmp_path, monkeypatch):
    interrupted(models, tmp_path, monkeypatch, memory="64MiB")
    bigmerge.merge(models, tmp_path / "out", workers=3)
    assert file_bytes(tmp_path / "out") == expected


def copy_of(models, tmp_path):
    copies = []
    for model in models:
        (tmp_path / model.name).mkdir()
        for path in model.iterdir():
            (tmp_path / model.name / path.name).write_bytes(path.read_bytes())
        copies.append(tmp_path / model.name)
    return copies


def change(path):
    """Change a few bytes in the second step's data, where no fingerprint sample lies, and hide it."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(3_000_000)
        file.write(b"\x01\x02\x03")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_what_was_read_from_an_input_that_changed_is_done_again(models, tmp_path, monkeypatch, caplog):
    copies = copy_of(models, tmp_path)
    interrupted(copies, tmp_path, monkeypatch)
    change(copies[1] / "model.safetensors")
    with caplog.at_level("WARNING", logger="bigmerge"):
        bigmerge.merge(copies, tmp_path / "out")
    assert f"changed since the interrupted run: {copies[1] / 'model.safetensors'}" in caplog.text
    assert "1 steps cannot be trusted" in caplog.text
    bigmerge.merge(copies, tmp_path / "anew")
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "anew")


def test_sums_of_a_fisher_that_changed_are_measured_again(models, tmp_path, monkeypatch, caplog):
    copies = copy_of(models, tmp_path)
    for copy in copies:
        squares = {name: value.abs() for name, value in read_checkpoint(copy).items()}
        write_fisher(copy.with_name(copy.name + "-fisher"), squares, model=copy, sums=False)
    sources = [*copies, *(copy.with_name(copy.name + "-fisher") for copy in copies)]
    interrupted(sources, tmp_path, monkeypatch)
    fisher = next(sources[-1].glob("*.safetensors"))
    with fisher.open("r+b") as file:  # where no fingerprint sample lies
        file.seek(3_000_000)
        file.write(torch.tensor([5e4], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
    with caplog.at_level("WARNING", logger="bigmerge"):
        bigmerge.merge(sources, tmp_path / "out")
    assert "what was measured of the inputs has changed; all steps are done again" in caplog.text
    bigmerge.merge(sources, tmp_path / "anew")
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "anew")


@pytest.mark.parametrize("put_back", [True, False])
def test_an_input_that_changes_during_the_run_is_never_merged_half(
    models, expected, tmp_path, monkeypatch, put_back
):
    copies = copy_of(models, tmp_path)
    weights = copies[1] / "model.safetensors"
    before = weights.read_bytes()
    original = worker.Shared.finished

    def change_after(self, entry, *arguments):
        original(self, entry, *arguments)
        if entry.number == 0:
            change(weights)

    with monkeypatch.context() as patch:
        patch.setattr(worker.Shared, "finished", change_after)
        with pytest.raises(CheckpointError, match=r"m1.*changed while it was being merged"):
            bigmerge.merge(copies, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()
    if put_back:
        stamps = weights.stat()
        weights.write_bytes(before)
        os.utime(weights, ns=(stamps.st_atime_ns, stamps.st_mtime_ns))
    bigmerge.merge(copies, tmp_path / "out")
    if put_back:
        assert file_bytes(tmp_path / "out") == expected
    else:
        bigmerge.merge(copies, tmp_path / "anew")
        assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "anew")


def test_inputs_that_were_only_touched_are_accepted(models, expected, tmp_path, monkeypatch):
    copies = copy_of(models, tmp_path)
    interrupted(copies, tmp_path, monkeypatch)
    for copy in copies:
        os.utime(copy / "model.safetensors", (1, 1))
    bigmerge.merge(copies, tmp_path / "out")
    assert file_bytes(tmp_path / "out") == expected


def test_an_input_truncated_during_the_run_is_a_clear_error(models, tmp_path, monkeypatch):
    copies = copy_of(models, tmp_path)
    original = worker.Shared.finished

    def truncate_after(self, entry, *arguments):
        original(self, entry, *arguments)
        if entry.number == 5:
            os.truncate(copies[1] / "model.safetensors", 1_000_000)

    monkeypatch.setattr(worker.Shared, "finished", truncate_after)
    with pytest.raises(BigmergeError, match=r"m1.*(cannot be read|ends before)"):
        bigmerge.merge(copies, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_a_clear_error_and_the_run_goes_on_later(models, expected, tmp_path, monkeypatch):
    import errno

    with monkeypatch.context() as patch:
        original = os.pwrite
        calls = [0]

        def pwrite(descriptor, data, offset):
            calls[0] += 1
            if calls[0] > 20:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(descriptor, data[: max(1, len(data) // 2)], offset)  # and short writes before

        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(OutputError, match="No space left") as caught:
            bigmerge.merge(models, tmp_path / "out")
        assert "goes on where it stopped" in str(caught.value)
    bigmerge.merge(models, tmp_path / "out")
    assert file_bytes(tmp_path / "out") == expected


def test_two_runs_on_one_output_exclude_each_other(models, tmp_path):
    out = tmp_path / "out"
    process = slow_merge(models, out)
    wait_for_steps(out, 2, process)
    with pytest.raises(OutputError, match="another process is writing it"):
        bigmerge.merge(models, out)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr


def test_an_existing_output_is_touched_only_on_request(models, expected, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        bigmerge.merge(models, out)
    assert (out / "precious.txt").read_text() == "mine"
    assert not Path(f"{out}.partial").exists()
    with pytest.raises(OutputError, match="holds no checkpoint, so it is not overwritten"):
        bigmerge.merge(models, out, overwrite=True)
    assert (out / "precious.txt").read_text() == "mine"
    (out / "model.safetensors").write_text("an earlier result")
    bigmerge.merge(models, out, overwrite=True)
    assert file_bytes(out) == expected


@pytest.mark.parametrize("place", ["start", "wait"])
def test_ctrl_c_at_any_point_of_waiting_ends_every_thread(models, expected, tmp_path, monkeypatch, place):
    hits = [0]
    owner = {"start": threading.Thread, "wait": threading.Event}[place]
    original = getattr(owner, place)

    def interrupt(self, *arguments):
        ours = place == "wait" or self.name.startswith("bigmerge-")
        if ours and sys._getframe(1).f_code.co_name == "_see_to_end":
            hits[0] += 1
            if hits[0] == 2:
                raise KeyboardInterrupt
        return original(self, *arguments)

    finished = worker.Shared.finished

    def slowly(self, *arguments):
        time.sleep(0.01)  # it must not be done before the second hit
        finished(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(worker.Shared, "finished", slowly)
        patch.setattr(owner, place, interrupt)
        with pytest.raises(Interrupted):
            bigmerge.merge(models, tmp_path / "out")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("bigmerge-")]
    bigmerge.merge(models, tmp_path / "out")
    assert file_bytes(tmp_path / "out") == expected


def test_ctrl_c_while_waiting_for_a_worker_waits_for_its_end(models, expected, tmp_path, monkeypatch):
    """A real signal: `Thread.join` would take the thread for ended."""
    finished = worker.Shared.finished
    at_work = set()

    def slowly(self, *arguments):
        at_work.add(threading.get_ident())
        time.sleep(0.5)
        finished(self, *arguments)
        at_work.discard(threading.get_ident())

    timer = threading.Timer(0.25, os.kill, (os.getpid(), signal.SIGINT))
    with monkeypatch.context() as patch:
        patch.setattr(worker.Shared, "finished", slowly)
        timer.start()
        with pytest.raises(Interrupted):
            bigmerge.merge(models, tmp_path / "out", workers=1)
        assert not at_work
    bigmerge.merge(models, tmp_path / "out")
    assert file_bytes(tmp_path / "out") == expected


def test_nothing_in_the_output_tells_when_or_how_it_was_made(models, expected):
    manifest = json.loads(expected["bigmerge.json"])
    assert set(manifest) == {
        "format", "bigmerge_version", "kind", "recipe", "sources", "dropped", "warnings", "digests", "tensors", "files"
    }  # fmt: skip
    assert set(manifest["tensors"]) == {"a", "b"}
    assert all(torch.tensor(len(entry["digest"])) == 32 for entry in manifest["tensors"].values())
