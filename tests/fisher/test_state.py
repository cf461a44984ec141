"""Saved sums taken up by the same, by more and by fewer processes. Threads stand in for processes."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from bigmerge.errors import ResumeError
from bigmerge.fisher.state import Progress, SavedState
from bigmerge.processes import Group

DIVISION = {"batch_examples": 4}


class ThreadGroup(Group):
    """A group whose members are threads of one process."""

    def __init__(self, rank: int, world: int, barrier: threading.Barrier, board: list) -> None:
        self.rank, self.world, self._barrier, self._board = rank, world, barrier, board
        self.device = torch.device("cpu")

    def gather(self, value):
        self._board[self.rank] = value
        self._barrier.wait(timeout=20)
        gathered = list(self._board)
        self._barrier.wait(timeout=20)
        return gathered


def in_group(world: int, work):
    """`work(group)` in `world` threads; the results by rank."""
    barrier, board = threading.Barrier(world), [None] * world
    with ThreadPoolExecutor(world) as pool:
        futures = [pool.submit(work, ThreadGroup(rank, world, barrier, board)) for rank in range(world)]
        return [future.result() for future in futures]


def example_sum(i: int) -> dict[str, torch.Tensor]:
    """What example `i` contributes: whole numbers, so that sums are exact in any order."""
    return {
        "a.weight": torch.arange(6.0).view(2, 3) * (i + 1),
        "b": torch.tensor(float(i)),
        "empty": torch.zeros(0, 2),
    }


def zeros() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(value) for name, value in example_sum(0).items()}


def session(directory, world: int, total: int, stop_after: int | None, *, division=DIVISION, every=0):
    """Every rank adds its share of `total` examples, stopping after `stop_after` of them."""

    def work(group):
        sums = zeros()
        state = SavedState(directory, group, division, sums, every)
        carried, progress = state.take_up()
        mine = [i for i in range(total) if i not in carried][group.rank :: world]
        for i in mine:
            if i in progress.finished:
                continue
            if stop_after is not None and len(progress.finished) >= stop_after:
                break
            for name, value in example_sum(i).items():
                sums[name] += value
            progress.finished.append(i)
            progress.tokens += 10
            if state.due():
                state.save(progress)
        return sums, carried, progress

    return in_group(world, work)


def total_of(results):
    sums = zeros()
    for part, _, _ in results:
        for name, value in part.items():
            sums[name] += value
    return sums


@pytest.mark.parametrize("worlds", [(1, 1), (2, 2, 2), (2, 3, 1), (1, 3), (3, 2, 2, 3)])
def test_every_example_counts_once_whoever_goes_on(tmp_path, worlds):
    total = 17
    for world in worlds[:-1]:
        session(tmp_path / "state", world, total, 2)
    results = session(tmp_path / "state", worlds[-1], total, None)
    expected = zeros()
    for i in range(total):
        for name, value in example_sum(i).items():
            expected[name] += value
    found = total_of(results)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert sum(progress.tokens for _, _, progress in results) == 10 * total
    counted = [i for _, _, progress in results for i in progress.finished]
    assert sorted([*results[0][1], *counted]) == list(range(total))


def test_nothing_is_taken_up_where_nothing_was_saved(tmp_path):
    def work(group):
        return SavedState(tmp_path / "state", group, DIVISION, zeros(), None).take_up()

    assert in_group(2, work) == [(frozenset(), Progress()), (frozenset(), Progress())]
    assert in_group(2, work) == [(frozenset(), Progress()), (frozenset(), Progress())]


def test_a_process_that_never_saved_starts_its_share_anew(tmp_path):
    session(tmp_path / "state", 2, 8, 3)
    (tmp_path / "state" / "sums-0-1.safetensors").unlink()
    (_, _, first), (_, _, second) = session(tmp_path / "state", 2, 8, 0)
    assert first.finished == [0, 2, 4]
    assert second.finished == []


def test_other_batches_are_a_new_division(tmp_path):
    session(tmp_path / "state", 2, 8, 3)
    results = session(tmp_path / "state", 2, 8, 0, division={"batch_examples": 5})
    assert results[0][1] == {0, 1, 2, 3, 4, 5}
    assert [progress.finished for _, _, progress in results] == [[], []]
    assert sum(progress.tokens for _, _, progress in results) == 60
    left = sorted(path.name for path in (tmp_path / "state").glob("sums-*"))
    assert left == ["sums-1-0.safetensors", "sums-1-1.safetensors"]


def test_a_new_division_counts_only_when_it_is_complete(tmp_path):
    """If the processes die while they take over, the old files still stand for everything."""
    state = tmp_path / "state"
    session(state, 2, 12, 3)
    shutil.copytree(state, tmp_path / "before")
    session(state, 3, 12, 0)
    for path in state.glob("sums-1-*"):
        shutil.copy(path, tmp_path / "before")  # some files of the new one, but not the file that says so
    results = session(tmp_path / "before", 1, 12, None)
    assert total_of(results)["b"] == sum(range(12))


def test_saving_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("bigmerge.fisher.state.time.monotonic", lambda: clock[0])

    def work(group):
        state = SavedState(tmp_path / "state", group, DIVISION, zeros(), 10.0)
        state.take_up()
        write = state._write

        def slow(progress):
            write(progress)
            clock[0] += 6.0

        monkeypatch.setattr(state, "_write", slow)
        assert not state.due()
        clock[0] += 10
        assert state.due()
        state.save(Progress([1], 1))
        clock[0] += 119
        assert not state.due()  # 6 s are 5 % of 120 s
        clock[0] += 2
        assert state.due()
        state.save(Progress([1], 1))
        assert clock[0] == 137  # nothing new, nothing written

    in_group(1, work)


def test_unreadable_state_says_what_to_do(tmp_path):
    session(tmp_path / "state", 1, 8, 3)
    path = tmp_path / "state" / "sums-0-0.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ResumeError, match="cannot be read") as caught:
        session(tmp_path / "state", 1, 8, None)
    assert str(tmp_path) in str(caught.value.hint)
    (tmp_path / "state" / "generation.json").write_text("{")
    with pytest.raises(ResumeError, match=r"generation\.json"):
        session(tmp_path / "state", 1, 8, None)


def test_an_error_on_one_process_ends_all(tmp_path):
    session(tmp_path / "state", 2, 8, 3)
    path = tmp_path / "state" / "sums-0-1.safetensors"
    path.write_bytes(b"broken")

    def work(group):
        with pytest.raises(ResumeError, match=r"sums-0-1\.safetensors"):
            SavedState(tmp_path / "state", group, DIVISION, zeros(), 0).take_up()
        return True

    assert in_group(2, work) == [True, True]
