"""A disk that fails, or a process that dies, at any call: a clear error, nothing half, the same bytes later."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

import bigmerge
from bigmerge.errors import BigmergeError, CheckpointError, OutputError
from bigmerge.merging.grid import STEP
from bigmerge.storage.staging import Staging, discard, partial_path
from tests.conftest import file_bytes, normal, write_checkpoint

#: what changes the disk or waits for it
CALLS = [
    "pwrite",
    "write",
    "fsync",
    "fdatasync",
    "ftruncate",
    "posix_fallocate",
    "mkdir",
    "rename",
    "replace",
    "unlink",
]
OPTIONS = {"shard_size": "2MB", "workers": 1}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for n in range(2):
        tensors = {f"h.{k}.weight": normal((1 << 20) + k, n * 10 + k).bfloat16() for k in range(3)}
        path = write_checkpoint(root / f"m{n}", tensors | {"norm": normal(30, n)}, config={"hidden_size": 1})
        (path / "tokenizer.json").write_text('{"model": {}}')
    return [root / "m0", root / "m1"]


@pytest.fixture(scope="module")
def expected(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "out"
    bigmerge.merge(models, out, **OPTIONS)
    return file_bytes(out)


@pytest.fixture(autouse=True)
def inputs_stay_as_they_are(models):
    before = [file_bytes(model) for model in models]
    yield
    assert [file_bytes(model) for model in models] == before


class Failing:
    """Counts calls that change files under `root`, and makes the one with number `fail_at` fail."""

    def __init__(self, monkeypatch, root, fail_at=None, code=errno.EIO):
        self.count = 0
        self.fail_at = fail_at
        self.code = code
        self.root = str(root)
        self.lock = threading.Lock()
        self.names = []
        for name in CALLS:
            monkeypatch.setattr(os, name, self.wrapped(name, getattr(os, name)))
        monkeypatch.setattr(os, "open", self.wrapped("open", os.open, self.opens_for_writing))
        monkeypatch.setattr(Path, "open", self.wrapped("Path.open", Path.open, self.path_for_writing))
        monkeypatch.setattr(shutil, "copyfile", self.wrapped("copyfile", shutil.copyfile))
        monkeypatch.setattr(Path, "write_text", self.wrapped("write_text", Path.write_text))

    @staticmethod
    def opens_for_writing(path, flags, *arguments, **options):
        return bool(flags & (os.O_WRONLY | os.O_RDWR))

    @staticmethod
    def path_for_writing(path, mode="r", *arguments, **options):
        return "w" in mode or "a" in mode

    def concerns(self, target):
        """Whether a path, or an open file, lies under `root`."""
        if isinstance(target, int):
            target = os.readlink(f"/proc/self/fd/{target}")
        return os.fspath(target).startswith(self.root)

    def wrapped(self, name, original, applies=lambda *arguments, **options: True):
        def call(target, *arguments, **options):
            if (
                isinstance(target, (int, str, Path))
                and applies(target, *arguments, **options)
                and self.concerns(target)
            ):
                with self.lock:
                    self.count += 1
                    self.names.append(name)
                    mine = self.count == self.fail_at
                if mine:
                    raise OSError(self.code, os.strerror(self.code), str(target))
            return original(target, *arguments, **options)

        return call


def merge_failing_at(monkeypatch, models, out, number, code, io=None, local=True):
    with monkeypatch.context() as patch:
        patch.setattr("bigmerge.merging.plan.on_local_disk", lambda path: local)
        calls = Failing(patch, out.parent, number, code)
        try:
            bigmerge.merge(models, out, io=io, **OPTIONS)
        except BigmergeError as error:
            return calls, error
    return calls, None


@pytest.mark.parametrize(
    ("code", "io", "local"),
    [(errno.ENOSPC, "mmap", False), (errno.EIO, "mmap", True), (errno.EIO, "direct", True)],
)
def test_a_disk_that_fails_at_any_call(models, expected, tmp_path, monkeypatch, code, io, local):
    (tmp_path / "count").mkdir()
    calls, error = merge_failing_at(monkeypatch, models, tmp_path / "count" / "out", None, code, io, local)
    assert error is None
    assert calls.count > 60
    assert {"pwrite", "fdatasync", "write", "posix_fallocate", "open", "fsync"} <= set(calls.names)
    unnoticed = []
    for number in range(1, calls.count + 1):
        root = tmp_path / f"{number}"
        root.mkdir()
        failed, error = merge_failing_at(monkeypatch, models, root / "out", number, code, io, local)
        if error is None:
            # What may fail without harm: leftovers after the output has got its name.
            unnoticed.append(failed.names[number - 1])
            assert file_bytes(root / "out") == expected
            continue
        assert isinstance(error, OutputError), (number, failed.names[number - 1], error)
        assert str(root) in error.message, (number, error)
        if code == errno.ENOSPC and error.data.get("errno") == code:
            assert "goes on where it stopped" in str(error.hint)
        if (root / "out").exists():  # only the wait for the directory's entry is left to fail
            assert file_bytes(root / "out") == expected
            shutil.rmtree(root / "out")
        bigmerge.merge(models, root / "out", **OPTIONS)
        assert file_bytes(root / "out") == expected, (number, failed.names[number - 1])
        assert not partial_path(root / "out").exists()
        shutil.rmtree(root)
    assert set(unnoticed) <= {"unlink", "posix_fallocate"}, unnoticed


def test_a_step_of_which_a_part_was_not_written_is_not_recorded(models, expected, tmp_path, monkeypatch):
    from bigmerge.storage.journal import Journal
    from bigmerge.storage.writing import CheckpointWriter

    options = {"io": "direct", "memory": "48MiB", **OPTIONS}
    plan = bigmerge.plan_merge(models, tmp_path / "out", **options)
    assert plan.schedule.window < STEP, "a step is written in several parts"
    write = CheckpointWriter.write

    def fail_once(self, name, offset, data):
        if offset == 0 and name == "h.1.weight":
            time.sleep(0.2)  # meanwhile the step's next part is made
            raise OutputError("the disk failed")
        write(self, name, offset, data)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", fail_once)
        with pytest.raises(OutputError, match="the disk failed"):
            bigmerge.merge(models, tmp_path / "out", **options)
    with Journal(partial_path(tmp_path / "out") / "journal-0") as journal:
        done = [plan.step(entry.number) for entry in journal.replay()]
    assert not [step for step in done if plan.tensors[step.tensor].name == "h.1.weight" and step.start == 0]
    bigmerge.merge(models, tmp_path / "out", **options)
    assert file_bytes(tmp_path / "out") == expected


def test_short_writes_and_short_reads(models, expected, tmp_path, monkeypatch):
    generator = random.Random(0)
    pwrite, preadv = os.pwrite, os.preadv
    lock = threading.Lock()

    def least(nbytes):
        with lock:
            return max(1, generator.choice([nbytes, nbytes // 2, nbytes - 1, min(nbytes, 4096)]))

    monkeypatch.setattr(
        os, "pwrite", lambda fd, data, at: pwrite(fd, memoryview(data)[: least(len(data))], at)
    )
    monkeypatch.setattr(
        os, "preadv", lambda fd, to, at: preadv(fd, [memoryview(to[0])[: least(len(to[0]))]], at)
    )
    bigmerge.merge(models, tmp_path / "out", io="pread", shard_size="2MB")
    assert file_bytes(tmp_path / "out") == expected


def test_an_input_that_cannot_be_read(models, expected, tmp_path, monkeypatch):
    preadv = os.preadv
    count = [0]

    def fail(descriptor, buffers, offset):
        count[0] += 1
        if count[0] == 9:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, buffers, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(CheckpointError, match=r"m[01].*cannot be read \(Input/output error\)"):
            bigmerge.merge(models, tmp_path / "out", io="pread", **OPTIONS)
    assert not (tmp_path / "out").exists()
    bigmerge.merge(models, tmp_path / "out", **OPTIONS)
    assert file_bytes(tmp_path / "out") == expected


@pytest.mark.parametrize("gone", ["out.partial", "."])
def test_an_output_directory_that_vanishes(models, expected, tmp_path, monkeypatch, gone):
    from bigmerge.merging import worker

    root = tmp_path / "root"
    root.mkdir()
    finished = worker.Shared.finished

    def vanish(self, entry, *arguments):
        finished(self, entry, *arguments)
        if entry.number == 1:
            shutil.rmtree(root / gone)

    with monkeypatch.context() as patch:
        patch.setattr(worker.Shared, "finished", vanish)
        with pytest.raises(OutputError, match=str(root)):
            bigmerge.merge(models, root / "out", **OPTIONS)
    assert not (root / "out").exists()
    bigmerge.merge(models, root / "out", **OPTIONS)
    assert file_bytes(root / "out") == expected


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become someone else")
@pytest.mark.usefixtures(
    "expected"
)  # everything is imported by then: another user may not read where Python lives
def test_a_directory_that_may_not_be_written(models):
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for model in models:
            shutil.copytree(model, root / model.name)
        for path in (root, *root.rglob("*")):
            path.chmod(0o755)
        before = sorted(root.rglob("*"))
        process = os.fork()
        if process == 0:
            code = 1
            try:
                os.setuid(65534)
                bigmerge.merge([root / model.name for model in models], root / "out", **OPTIONS)
            except OutputError as error:
                code = 0 if "Permission denied" in error.message else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
        assert sorted(root.rglob("*")) == before


# -- death --------------------------------------------------------------------------------------------------

SERVER = """
import json, os, random, signal, sys, threading, time
import torch, bigmerge
from bigmerge.merging import engine, execution, finishing, ranks  # all that a run imports
torch.set_num_threads(1)
CALLS = ["pwrite", "write", "fsync", "fdatasync", "ftruncate", "posix_fallocate", "mkdir", "rename", "replace",
         "unlink", "open", "preadv", "stat"]
def dying(at):
    count, lock = [0], threading.Lock()
    def wrap(original):
        def call(*arguments, **options):
            with lock:
                count[0] += 1
                if count[0] == at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)
        return call
    for name in CALLS:
        setattr(os, name, wrap(getattr(os, name)))
    return count
for line in sys.stdin:
    told = json.loads(line)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if told["delay"]:
                threading.Timer(told["delay"], os.kill, (os.getpid(), signal.SIGKILL)).start()
            count = dying(told["at"])
            bigmerge.merge(told["models"], told["out"], **told["options"])
            os.set_blocking(write, True)
            code = 0
            os.write(write, str(count[0]).encode())
        finally:
            os._exit(code)
    os.close(write)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps({"status": status, "calls": int(os.read(read, 20) or 0)}), flush=True)
    os.close(read)
"""


@pytest.fixture
def server():
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def ask(models, out, *, at=0, delay=0.0, **options):
        request = {"models": [str(m) for m in models], "out": str(out), "at": at, "delay": delay}
        process.stdin.write(json.dumps(request | {"options": OPTIONS | options}) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield ask
    process.stdin.close()
    process.wait()


@pytest.mark.parametrize(("overwrite", "io"), [(False, "mmap"), (True, "mmap"), (False, "direct")])
def test_kill_9_at_fifty_moments(models, expected, tmp_path, server, overwrite, io):
    """Seeded system calls from the first to the last, each run killed again up to twice before it may finish."""
    generator = random.Random(overwrite)
    whole = server(models, tmp_path / "whole", io=io)
    assert whole["status"] == 0
    kills = 0
    old = {"config.json": b"{}", "model.safetensors": b"old"}
    while kills < 50:
        out = tmp_path / "out"
        if overwrite:
            out.mkdir()
            for name, content in old.items():
                (out / name).write_bytes(content)
        for _ in range(generator.randint(1, 3)):
            told = server(models, out, at=generator.randint(1, whole["calls"]), overwrite=overwrite, io=io)
            kills += told["status"] == -9
            if told["status"] == 0:
                break
            assert told["status"] == -9
            if out.exists():
                found = file_bytes(out)
                assert found == expected or (overwrite and found == old), "never anything half"
        final = server(models, out, overwrite=True, io=io)
        assert final["status"] == 0
        assert file_bytes(out) == expected
        shutil.rmtree(out)


def test_kill_9_after_random_times(models, expected, tmp_path, server):
    generator = random.Random(5)
    out = tmp_path / "out"
    kills = 0
    for _ in range(20):
        told = server(models, out, delay=generator.uniform(0.001, 0.25))
        kills += told["status"] == -9
        assert told["status"] in (0, -9)
        if out.exists():  # it may have been killed just after that
            assert file_bytes(out) == expected
            shutil.rmtree(out)
    assert kills
    shutil.rmtree(out, ignore_errors=True)
    bigmerge.merge(models, out, **OPTIONS)
    assert file_bytes(out) == expected


# -- giving up ----------------------------------------------------------------------------------------------


def unfinished(models, out, monkeypatch):
    calls, error = merge_failing_at(monkeypatch, models, out, 40, errno.EIO)
    assert error is not None, calls.count
    assert partial_path(out).exists()


def test_discard_removes_the_unfinished_work_alone(models, expected, tmp_path, monkeypatch, capsys):
    from bigmerge.cli.main import main

    out = tmp_path / "out"
    unfinished(models, out, monkeypatch)
    out.mkdir()
    (out / "mine").write_text("kept")
    with pytest.raises(SystemExit) as ended:
        main(["merge", "--discard", "-o", str(out), "--json"])
    assert not ended.value.code
    told = json.loads(capsys.readouterr().out)
    assert told["discarded"] == str(partial_path(out))
    assert told["bytes"] > 1_000_000
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "mine").read_text() == "kept"
    bigmerge.merge(models, tmp_path / "other", **OPTIONS)
    assert file_bytes(tmp_path / "other") == expected


def test_discard_refuses_what_is_not_its_own(models, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="there is no unfinished work"):
        discard(out)
    partial_path(out).mkdir()
    (partial_path(out) / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="is no unfinished work of bigmerge"):
        discard(out)
    other = tmp_path / "other"
    unfinished(models, other, monkeypatch)
    partial_path(tmp_path / "link").symlink_to(partial_path(other))
    with pytest.raises(OutputError, match="is no unfinished work of bigmerge"):
        discard(tmp_path / "link")
    assert partial_path(other).exists()
    with (
        Staging(tmp_path / "busy", {"a": 1}),
        pytest.raises(OutputError, match="another process is writing it"),
    ):
        discard(tmp_path / "busy")
    assert partial_path(tmp_path / "busy").exists()
    assert (partial_path(out) / "thesis.tex").exists()
