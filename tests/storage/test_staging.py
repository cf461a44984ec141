"""bigmerge.storage.staging: one at a time, only the same work, and OUT appears whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bigmerge.errors import OutputError, ResumeError
from bigmerge.storage import staging as module
from bigmerge.storage.staging import Staging, check_free, partial_path

RUN: dict[str, Any] = {
    "weights": [0.1, 1 / 3, 1e-300, 5e-324, 0.30000000000000004, 1.7976931348623157e308],
    "models": [{"name": "ä", "fingerprint": "x"}, {"name": "b", "fingerprint": "y"}],
    "pair": (1, 2),
    "nothing": None,
}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "out"


def fill(staging: Staging, content: str = "new") -> None:
    (staging.output / "model.safetensors").write_text(content)
    (staging.output / "sub").mkdir(exist_ok=True)
    (staging.output / "sub" / "x").write_text("x")


# -- the way of all work ------------------------------------------------------------------------------------


def test_publish(out: Path) -> None:
    with Staging(out, RUN) as staging:
        assert staging.scratch == partial_path(out) == out.with_name("out.partial")
        assert not staging.resumed
        fill(staging)
        (staging.scratch / "journal").write_text("done")
        assert not out.exists()
        staging.publish()
        assert sorted(path.name for path in out.iterdir()) == ["model.safetensors", "sub"]
    assert not staging.scratch.exists()
    assert list(out.parent.iterdir()) == [out]


def test_going_on(out: Path) -> None:
    with Staging(out, RUN) as staging:
        fill(staging)
        (staging.scratch / "journal").write_text("half")
    for _ in range(2):
        with Staging(out, RUN) as staging:
            assert staging.resumed
            assert (staging.scratch / "journal").read_text() == "half"
            assert (staging.output / "model.safetensors").read_text() == "new"
    with Staging(out, RUN) as staging:
        staging.publish()
    assert (out / "model.safetensors").read_text() == "new"


def test_a_failure_leaves_the_work_and_frees_the_lock(out: Path) -> None:
    def fail() -> None:
        with Staging(out, RUN) as staging:
            fill(staging)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with Staging(out, RUN) as staging:
        assert staging.resumed


# -- another run --------------------------------------------------------------------------------------------


def test_another_run_is_refused_with_what_differs(out: Path) -> None:
    with Staging(out, RUN) as staging:
        fill(staging)
    other = json.loads(json.dumps(RUN))
    other["weights"][1] = 0.5
    other["models"][0]["name"] = "c"
    other["more"] = True
    del other["nothing"]
    del other["pair"]
    with pytest.raises(ResumeError, match="unfinished work of another run") as caught, Staging(out, other):
        pass
    assert caught.value.data["differences"] == [
        'models[0].name: "ä" before, "c" now',
        "more: null before, true now",
        "pair: [1, 2] before, null now",
        "weights[1]: 0.3333333333333333 before, 0.5 now",
    ]
    assert all(line in caught.value.message for line in caught.value.data["differences"])
    assert str(partial_path(out)) in str(caught.value)
    with Staging(out, RUN) as staging:
        assert staging.resumed, "the refused run has changed nothing"
        assert (staging.output / "model.safetensors").read_text() == "new"


def test_lists_of_other_length_and_numbers_next_to_each_other(out: Path) -> None:
    with Staging(out, RUN):
        pass
    near = {**RUN, "weights": [math.nextafter(0.1, 1), *RUN["weights"][1:]]}
    for other in (near, {**RUN, "weights": RUN["weights"][:-1]}, {}):
        with pytest.raises(ResumeError), Staging(out, other):
            pass


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\xff"])
def test_a_damaged_record_is_never_taken_up(out: Path, content: str) -> None:
    with Staging(out, RUN):
        pass
    (partial_path(out) / "run.json").write_text(content, encoding="latin-1")
    with pytest.raises(ResumeError) as caught, Staging(out, RUN):
        pass
    assert f"`bigmerge merge --discard -o {out}` removes" in str(caught.value)


@pytest.mark.parametrize("missing", ["run.json", "output"])
def test_leftovers_that_belong_to_no_run_are_removed(out: Path, missing: str) -> None:
    with Staging(out, RUN) as staging:
        fill(staging)
        (staging.scratch / "journal").write_text("claims")
        (staging.scratch / "run.json").unlink() if missing == "run.json" else staging.output.rename(
            out.parent / "elsewhere"
        )
    with Staging(out, {"another": "run"}) as staging:
        assert not staging.resumed
        assert sorted(path.name for path in staging.scratch.iterdir()) == ["lock", "output", "run.json"]
        assert list(staging.output.iterdir()) == []


# -- the lock -----------------------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from bigmerge.storage.staging import Staging
with Staging(Path(sys.argv[1]), {"a": 1}):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_ends(out: Path) -> None:
    with Staging(out, {"a": 1}), pytest.raises(OutputError, match="another process is writing it"), \
         Staging(out, {"a": 1}):  # fmt: skip
        pass
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match="another process is writing it") as caught, \
             Staging(out, {"a": 1}):  # fmt: skip
            pass
        assert str(out) in caught.value.message
        holder.kill()
        holder.wait()
        with Staging(out, {"a": 1}) as staging:
            assert staging.resumed, "the lock dies with its owner, the work does not"
    finally:
        holder.kill()
        holder.communicate()


def test_a_lock_on_what_another_process_has_removed_meanwhile(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.fcntl.flock

    def slow(descriptor: int, operation: int) -> None:
        partial_path(out).rename(out.parent / "gone")
        real(descriptor, operation)

    monkeypatch.setattr(module.fcntl, "flock", slow)
    with pytest.raises(OutputError, match="has just finished"), Staging(out, RUN):
        pass


def test_an_output_that_appears_while_waiting(out: Path) -> None:
    staging = Staging(out, RUN)
    out.mkdir(parents=True)
    with pytest.raises(OutputError, match="exists already"), staging:
        pass


# -- an output that exists ----------------------------------------------------------------------------------


def test_an_existing_output_is_not_touched(out: Path) -> None:
    out.mkdir(parents=True)
    (out / "precious").write_text("data")
    with pytest.raises(OutputError, match="exists already") as caught:
        Staging(out, RUN)
    assert "--overwrite" in str(caught.value)
    assert sorted(path.name for path in out.parent.rglob("*")) == ["out", "precious"]


def test_overwrite_replaces_at_the_end(out: Path) -> None:
    out.mkdir(parents=True)
    (out / "old.safetensors").write_text("old")
    with Staging(out, RUN, overwrite=True) as staging:
        fill(staging)
        assert (out / "old.safetensors").read_text() == "old"
        staging.publish()
    assert sorted(path.name for path in out.iterdir()) == ["model.safetensors", "sub"]
    assert list(out.parent.iterdir()) == [out]


def test_killed_after_the_exchange_nothing_of_the_old_output_comes_back(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out.mkdir(parents=True)
    (out / "old.safetensors").write_text("old")
    with Staging(out, RUN, overwrite=True) as staging:
        fill(staging)
        monkeypatch.setattr(module.shutil, "rmtree", lambda *arguments, **options: None)
        staging.publish()
        monkeypatch.undo()
    assert (staging.output / "old.safetensors").exists(), "as a kill would leave it"
    with Staging(out, RUN, overwrite=True) as again:
        assert not again.resumed
        fill(again, "newer")
        again.publish()
    assert sorted(path.name for path in out.iterdir()) == ["model.safetensors", "sub"]
    assert (out / "model.safetensors").read_text() == "newer"


@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL])
def test_file_systems_without_exchange(
    out: Path, monkeypatch: pytest.MonkeyPatch, code: int, replaces: bool
) -> None:
    monkeypatch.setattr(module, "_rename", lambda source, target, flags: code)
    if replaces:
        out.mkdir(parents=True)
        (out / "old.safetensors").write_text("old")
    with Staging(out, RUN, overwrite=replaces) as staging:
        fill(staging)
        staging.publish()
    assert sorted(path.name for path in out.iterdir()) == ["model.safetensors", "sub"]
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("code", [0, errno.ENOSYS])
def test_something_that_appears_before_publishing_is_kept(
    out: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    if code:
        monkeypatch.setattr(module, "_rename", lambda source, target, flags: code)
    with Staging(out, RUN) as staging:
        fill(staging)
        out.mkdir()
        (out / "other").write_text("other")
        with pytest.raises(OutputError, match="cannot be given its name") as caught:
            staging.publish()
        assert str(staging.output) in str(caught.value)
        assert (staging.output / "model.safetensors").exists()
    assert (out / "other").read_text() == "other"


def test_publish_waits_for_the_disk(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    with Staging(out, RUN) as staging:
        fill(staging)
        monkeypatch.setattr(os, "fsync", fsync)
        staging.publish()
    assert sorted(synced[:-2]) == ["model.safetensors", "sub", "x"]
    assert synced[-2:] == ["output", out.parent.name], "its entries before the rename, the parent's after"


# -- outputs that cannot be ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", ".", "..", "/", "a/.."])
def test_no_name(name: str) -> None:
    with pytest.raises(OutputError, match="no name for an output"):
        check_free(Path(name), overwrite=True)


def test_overwrite_takes_only_directories(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "directory")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name, kind in (("file", "is no directory"), ("link", "is a link"), ("dangling", "is a link")):
        with pytest.raises(OutputError, match="exists already"):
            check_free(tmp_path / name, overwrite=False)
        with pytest.raises(OutputError, match=f"{kind}, so it is not overwritten"):
            check_free(tmp_path / name, overwrite=True)
    check_free(tmp_path / "directory", overwrite=True)


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"file: is no directory"):
        check_free(tmp_path / "file" / "a" / "out", overwrite=False)


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    out = tmp_path / ("x" * 250)
    with pytest.raises(OutputError, match="cannot be made") as caught, Staging(out, RUN):
        pass
    assert "too long" in caught.value.message
