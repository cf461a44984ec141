"""What processes say to each other; how many are started; what a failed launch is reported as."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import threading
from types import SimpleNamespace

import pytest
import torch

from bigmerge.errors import (
    BigmergeError,
    DatasetError,
    EstimationError,
    Interrupted,
    ResumeError,
    UsageError,
)
from bigmerge.fisher import launching
from bigmerge.fisher.interruption import StopRequest
from bigmerge.fisher.settings import DataSettings, FisherSettings, ProcessSettings
from bigmerge.processes import (
    Group,
    Notices,
    describe_error,
    read_error,
    restore_error,
    write_error,
)


def test_errors_travel_whole(tmp_path):
    error = DatasetError("row 3: no text", hint="look", row=3, names=["a", "b"])
    write_error(tmp_path / "rank-1.error", error)
    for restored in (read_error(tmp_path / "rank-1.error"), restore_error(describe_error(error))):
        assert type(restored) is DatasetError
        assert (restored.message, restored.hint, restored.data) == (error.message, "look", error.data)
        assert restored.exit_code == 3
    assert [path.name for path in tmp_path.iterdir()] == ["rank-1.error"]
    assert "ZeroDivisionError: oh" in restore_error(describe_error(ZeroDivisionError("oh"))).message
    assert pickle.loads(pickle.dumps(describe_error(error))) == describe_error(error)


def test_settings_travel_whole():
    settings = FisherSettings(
        model="m",
        out=launching.Path("o"),
        data=DataSettings("d", "s", "test", 5, 3, False),
        text_columns=("a", "b"),
        processes=ProcessSettings(True, 2, True),
        save_every=0.5,
    )
    assert FisherSettings.from_json(settings.as_json()) == settings
    import json

    assert FisherSettings.from_json(json.loads(json.dumps(settings.as_json()))) == settings


def test_one_process_needs_no_other():
    group = Group(cpu=True)
    assert (group.rank, group.world, group.is_main, group.device.type) == (0, 1, True, "cpu")
    assert group.gather("x") == ["x"]
    assert group.main_first(lambda: 3) == group.from_main(lambda: 3) == 3
    with pytest.raises(ResumeError, match="no"):
        group.together(lambda: (_ for _ in ()).throw(ResumeError("no")))
    tensor = torch.ones(2)
    group.sum_to_main(tensor)
    assert tensor.tolist() == [1, 1]
    group.close()


def pair(directory):
    groups = [SimpleNamespace(rank=rank, world=2) for rank in range(2)]
    notices = [Notices(directory, group) for group in groups]
    notices[0].clear()
    return notices


def test_a_process_waits_for_the_others(tmp_path):
    first, second = pair(tmp_path / "n")
    first.done()
    ticks = []

    def tick():
        ticks.append(1)
        if len(ticks) == 3:
            second.done()

    first.wait(tick)
    assert len(ticks) == 3


def test_a_process_hears_of_anothers_failure_but_not_of_its_own(tmp_path):
    first, second = pair(tmp_path / "n")
    first.check()
    second.failed(EstimationError("row 7 is not finite", row=7))
    second.check()
    with pytest.raises(EstimationError, match="row 7"):
        first.check()
    with pytest.raises(EstimationError, match="row 7"):
        first.wait(lambda: None)
    first.clear()
    first.check()


def test_waiting_can_be_interrupted(tmp_path):
    first, _ = pair(tmp_path / "n")
    first.done()

    def tick():
        raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        first.wait(tick)


# -- how many --------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    def make(gpus, cores, memory):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(launching.os, "sched_getaffinity", lambda _: set(range(cores)))
        monkeypatch.setattr(launching, "available_memory", lambda: memory)

    return make


def test_one_process_per_gpu(machine):
    machine(4, 16, 1000)
    assert launching.count_processes(ProcessSettings(), 10) == (1, False)
    assert launching.count_processes(ProcessSettings(multi_gpu=True), 10) == (4, False)
    assert launching.count_processes(ProcessSettings(num_processes=2), 10) == (2, False)
    assert launching.count_processes(ProcessSettings(num_processes=8, cpu=True), 10) == (8, True)
    with pytest.raises(UsageError, match="there are 4 GPUs"):
        launching.count_processes(ProcessSettings(num_processes=5), 10)


def test_without_gpus_it_says_so_and_uses_the_cores(machine, caplog):
    machine(0, 6, 1000)
    with caplog.at_level(logging.WARNING, "bigmerge"):
        logging.getLogger("bigmerge").propagate = True
        assert launching.count_processes(ProcessSettings(multi_gpu=True), 10) == (6, True)
    assert "NO GPU WAS FOUND" in caplog.text
    assert launching.count_processes(ProcessSettings(multi_gpu=True), 300) == (3, True)
    assert launching.count_processes(ProcessSettings(multi_gpu=True), 10_000) == (1, True)
    assert launching.count_processes(ProcessSettings(multi_gpu=True, num_processes=2), 10) == (2, True)
    assert launching.count_processes(ProcessSettings(), 10) == (1, True)


def test_available_memory_is_plausible():
    assert 1 << 20 < launching.available_memory() < 1 << 50


# -- failed launches -------------------------------------------------------------------------------------


class SignalException(Exception):
    """Named like what the launcher raises when it is signalled."""


def launch_failure(*codes):
    failures = {
        rank: SimpleNamespace(exitcode=code, timestamp=rank) for rank, code in enumerate(codes) if code
    }
    error = RuntimeError("the launcher's long report")
    error.failures = failures
    return error


def test_the_first_real_error_is_reported(tmp_path):
    write_error(tmp_path / "rank-0.error", Interrupted("stopped by the launcher"))
    write_error(tmp_path / "rank-1.error", DatasetError("row 3"))
    assert type(launching._explain(tmp_path, launch_failure(130, 3))) is DatasetError
    (tmp_path / "rank-1.error").unlink()
    assert type(launching._explain(tmp_path, SignalException())) is Interrupted
    killed = launching._explain(tmp_path, launch_failure(130, -signal.SIGKILL))
    assert "process 1 was killed" in killed.message  # and process 0 stopped because of that


def test_a_process_that_left_no_word(tmp_path):
    killed = launching._explain(tmp_path, launch_failure(0, -signal.SIGKILL))
    assert type(killed) is EstimationError
    assert "process 1 was killed (SIGKILL)" in killed.message
    assert "exit code 7" in launching._explain(tmp_path, launch_failure(7)).message
    assert type(launching._explain(tmp_path, SignalException())) is Interrupted
    assert type(launching._explain(tmp_path, KeyboardInterrupt())) is Interrupted
    odd = launching._explain(tmp_path, OSError("no such program"))
    assert isinstance(odd, BigmergeError)
    assert "no such program" in odd.message


# -- signals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_only_ask(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.asked
        signal.raise_signal(number)
        assert stop.asked
        signal.raise_signal(signal.SIGTERM)  # asking twice changes nothing
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(number) is before


def test_other_threads_leave_signals_alone():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work():
        with StopRequest() as stop:
            seen.append((signal.getsignal(signal.SIGINT), stop.asked))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


def test_a_dead_parent_asks_too(monkeypatch):
    with StopRequest(parent=os.getppid()) as stop:
        assert not stop.asked
        monkeypatch.setattr("bigmerge.fisher.interruption.os.getppid", lambda: 1)
        assert stop.asked
