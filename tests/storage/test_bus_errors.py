"""bigmerge.storage.bus_errors: real faults in mapped files, here and in processes that may die of them."""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from bigmerge.storage import bus_errors
from bigmerge.storage.bus_errors import watch_mapping

PAGE = mmap.PAGESIZE
PATTERN = bytes(range(1, 129))  # no zeros, and a divisor of every page
# Elsewhere the faults below would kill pytest itself, not fail a test.
pytestmark = pytest.mark.skipif(not bus_errors._SUPPORTED, reason="watches find nothing on this platform")

PREAMBLE = """
import ctypes, faulthandler, gc, mmap, os, random, signal, struct, sys, threading
import numpy as np
from bigmerge.storage.bus_errors import watch_mapping
PAGE = mmap.PAGESIZE
PATH = sys.argv[1]
def mapped(name, pages):
    path = PATH + name
    with open(path, "wb") as file:
        file.write(bytes(range(1, 129)) * (PAGE // 128) * pages)
    with open(path, "rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)
    return path, mapping, np.frombuffer(mapping, dtype=np.uint8)
def watched(array):
    return watch_mapping(array.ctypes.data, array.nbytes)
libc = ctypes.CDLL(None, use_errno=True)
def raw_action():
    raw = ctypes.create_string_buffer(256)
    assert libc.sigaction(signal.SIGBUS, None, raw) == 0
    return raw
def action():
    # Behind the kernel's 64 signals the C library leaves the mask as it was; SA_RESTORER is its own addition.
    handler, mask, flags = struct.unpack_from("QQ120xI", raw_action())
    return handler, mask, flags & ~0x04000000
"""


def run(tmp_path: Path, program: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-c", PREAMBLE + program, str(tmp_path / "file")],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


class Mapped:
    def __init__(self, path: Path, pages: int) -> None:
        self.path = path
        path.write_bytes(PATTERN * (PAGE // 128) * pages)
        with path.open("rb") as file:
            self.mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)
        self.array = np.frombuffer(self.mapping, dtype=np.uint8)
        # Populated as a window is before it is used: the truncation comes between this and the touch.
        assert int(self.array.min()) == 1
        self.watch = watch_mapping(self.array.ctypes.data, self.array.nbytes)

    def expected(self, pages: int) -> bytes:
        return (PATTERN * (PAGE // 128) * pages).ljust(self.array.nbytes, b"\0")


@pytest.fixture(autouse=True)
def _traced() -> Iterator[None]:
    """With faulthandler's handler below the watches', as pytest has it unless it was told not to."""
    before = faulthandler.is_enabled()
    if not before:
        faulthandler.enable()
    yield
    assert faulthandler.is_enabled()
    if not before:
        faulthandler.disable()


@pytest.mark.parametrize(
    "read",
    [
        lambda file: bytes(memoryview(file.mapping)),
        lambda file: file.array.copy().tobytes(),
        lambda file: torch.frombuffer(file.mapping, dtype=torch.uint8).clone().numpy().tobytes(),
        lambda file: (
            torch.frombuffer(file.mapping, dtype=torch.uint8)
            .to(torch.float32)
            .to(torch.uint8)
            .numpy()
            .tobytes()
        ),
    ],
    ids=["bytes", "numpy", "torch", "torch conversion"],
)
def test_what_is_left_reads_true_and_what_is_gone_reads_as_zeros(tmp_path: Path, read) -> None:
    file = Mapped(tmp_path / "file", 600)  # more than torch gives to one thread
    assert not file.watch.broken
    os.truncate(file.path, 123 * PAGE)
    assert read(file) == file.expected(123)
    assert file.watch.broken
    file.watch.close()
    assert file.watch.broken, "it can be asked later, too"


def test_hashes_of_what_is_gone_are_hashes_of_zeros(tmp_path: Path) -> None:
    file = Mapped(tmp_path / "file", 600)
    os.truncate(file.path, 5 * PAGE)
    digest = xxhash.xxh3_64(memoryview(file.mapping)).digest()
    assert digest == xxhash.xxh3_64(file.expected(5)).digest()
    assert file.watch.broken
    file.watch.close()


def test_only_the_file_that_was_truncated_is_broken_and_only_once_it_is_touched(tmp_path: Path) -> None:
    file, other = Mapped(tmp_path / "a", 100), Mapped(tmp_path / "b", 100)
    os.truncate(file.path, 40 * PAGE)
    assert bytes(file.mapping[: 40 * PAGE]) == PATTERN * (40 * PAGE // 128)
    assert not file.watch.broken
    assert bytes(file.mapping[60 * PAGE : 61 * PAGE]) == bytes(PAGE)
    assert file.watch.broken
    assert bytes(other.mapping) == other.expected(100)
    assert not other.watch.broken
    file.watch.close()
    other.watch.close()


def test_a_file_that_is_extended_again_stays_broken(tmp_path: Path) -> None:
    file = Mapped(tmp_path / "file", 100)
    os.truncate(file.path, 0)
    assert file.array[50 * PAGE] == 0
    file.path.write_bytes(PATTERN * (PAGE // 128) * 100)
    assert file.array[50 * PAGE] == 0, "nothing of what comes later is mixed in"
    assert file.watch.broken
    file.watch.close()


def test_all_watches_of_one_mapping_are_told(tmp_path: Path) -> None:
    file = Mapped(tmp_path / "file", 100)
    address = file.array.ctypes.data
    same = watch_mapping(address, 100 * PAGE)
    behind = watch_mapping(address + 50 * PAGE, 50 * PAGE)
    before = watch_mapping(address, 10 * PAGE)
    os.truncate(file.path, 20 * PAGE)
    assert file.array[30 * PAGE] == 0
    # Zeros now lie from page 30 on, so a later touch at page 50 is no fault any more.
    assert [watch.broken for watch in (file.watch, same, behind, before)] == [True, True, True, False]
    for watch in (file.watch, same, behind, before):
        watch.close()


def test_several_threads_fault_at_once_in_native_code(tmp_path: Path) -> None:
    file = Mapped(tmp_path / "file", 2000)
    tensor = torch.frombuffer(file.mapping, dtype=torch.uint8)
    start = threading.Barrier(5)
    results: list[bytes] = []

    def read() -> None:
        start.wait()
        results.append(tensor.to(torch.int16).to(torch.uint8).numpy().tobytes())

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    os.truncate(file.path, 7 * PAGE)
    start.wait()
    for thread in threads:
        thread.join()
    assert results == [file.expected(7)] * 4
    assert file.watch.broken
    file.watch.close()


@pytest.mark.parametrize("rounds", [40, pytest.param(400, marks=pytest.mark.slow)])
def test_truncation_at_any_moment_gives_true_bytes_or_zeros_that_are_known(
    tmp_path: Path, rounds: int
) -> None:
    done = run(tmp_path, f"rounds, PAGES = {rounds}, 150" + """
import time, torch, xxhash
sys.setswitchinterval(1e-4)
generator = random.Random(0)
true = np.frombuffer(bytes(range(1, 129)) * (PAGE // 128) * PAGES, dtype=np.uint8)
true_digest = xxhash.xxh3_64(memoryview(true)).digest()
problems = []
def as_bytes(mapping, tensor): return np.frombuffer(bytes(memoryview(mapping)), dtype=np.uint8)
def by_torch(mapping, tensor): return tensor.to(torch.int16).to(torch.uint8).numpy()
def by_numpy(mapping, tensor): return np.frombuffer(mapping, dtype=np.uint8).copy()
def check(seen, watch):
    if np.array_equal(seen, true):
        return
    if not watch.broken:
        problems.append("not told")
    if not np.all((seen == true) | (seen == 0)):
        problems.append("garbage")
for round in range(rounds):
    path, mapping, array = mapped("a", PAGES)
    tensor = torch.from_numpy(array)
    watch = watched(array)
    start, gone = threading.Barrier(5), threading.Event()
    def read(how):
        start.wait()
        more = True
        while more:
            more = not gone.is_set()  # once more after the truncation, whenever it was
            if how is None:
                if xxhash.xxh3_64(memoryview(mapping)).digest() != true_digest and not watch.broken:
                    problems.append("digest not told")
            else:
                check(how(mapping, tensor), watch)
    threads = [threading.Thread(target=read, args=(how,)) for how in (as_bytes, by_torch, by_numpy, None)]
    for thread in threads:
        thread.start()
    start.wait()
    time.sleep(generator.uniform(0, 0.003))
    os.truncate(path, generator.randrange(PAGES) * PAGE)
    gone.set()
    for thread in threads:
        thread.join()
    assert watch.broken
    watch.close()
    assert not problems, (round, problems)
print("rounds", rounds)
""")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"rounds {rounds}\n"


@pytest.mark.parametrize(
    "fault",
    [
        "first.close(); os.truncate(path, 0); array[50 * PAGE]",
        "os.truncate(other_path, 0); other[50 * PAGE]",
        "os.kill(os.getpid(), signal.SIGBUS)",
        "signal.raise_signal(signal.SIGBUS)",
    ],
    ids=["no longer watched", "never watched", "sent", "raised"],
)
def test_other_signals_meet_the_handler_that_was_there(tmp_path: Path, fault: str) -> None:
    program = f"""
path, mapping, array = mapped("a", 100)
other_path, other_mapping, other = mapped("b", 100)
before = signal.getsignal(signal.SIGBUS)
first = watched(array)
assert signal.getsignal(signal.SIGBUS) == before
{fault}
print("survived")
"""
    done = run(tmp_path, program)
    assert done.returncode == -signal.SIGBUS, done.stderr
    assert done.stdout == ""
    done = run(tmp_path, program, "-X", "faulthandler")
    assert done.returncode == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in done.stderr


def test_a_signal_from_another_process_is_not_swallowed(tmp_path: Path) -> None:
    program = (
        PREAMBLE
        + """
import time
path, mapping, array = mapped("a", 4)
watch = watched(array)
print("ready", flush=True)
time.sleep(60)
"""
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "file")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGBUS)
    assert process.wait(timeout=30) == -signal.SIGBUS
    process.stdout.close()


@pytest.mark.parametrize(("code", "asynchronous"), [(1, False), (3, False), (4, False), (5, True)])
def test_hardware_errors_in_watched_mappings_are_not_swallowed(
    tmp_path: Path, code: int, asynchronous: bool
) -> None:
    # Sent with the kernel's own codes, which a process may send to itself alone. BUS_MCEERR_AR (4) and its like
    # come again with their instruction, so the old handler must be there for that; BUS_MCEERR_AO (5) comes once.
    done = run(tmp_path, f"""
path, mapping, array = mapped("a", 4)
hits = []
signal.signal(signal.SIGBUS, lambda *_: hits.append(1))
before = action()
watch = watched(array)
assert action() != before
information = ctypes.create_string_buffer(struct.pack("iiiiQ", signal.SIGBUS, 0, {code}, 0, array.ctypes.data), 128)
RT_TGSIGQUEUEINFO = {{"x86_64": 297, "aarch64": 240}}[os.uname().machine]
assert libc.syscall(RT_TGSIGQUEUEINFO, os.getpid(), threading.get_native_id(), signal.SIGBUS, information) == 0
assert not watch.broken
if {asynchronous}:
    assert hits == [1]
else:
    assert not hits
    assert action() == before
""")  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_handler_comes_and_goes_with_the_watches(tmp_path: Path) -> None:
    done = run(tmp_path, """
hits = []
signal.signal(signal.SIGBUS, lambda *_: hits.append(1))
path, mapping, array = mapped("a", 4)
before = action()
one, two = watched(array[:PAGE]), watched(array[PAGE:])
assert action() != before
watch_mapping(0, 0).close()
one.close(), one.close()
assert action() != before, "there is one left"
two.close()
assert action() == before
os.kill(os.getpid(), signal.SIGBUS)
assert hits == [1]
three = watched(array)
os.kill(os.getpid(), signal.SIGBUS)
assert hits == [1, 1], "a handler written in Python is asked too"
os.truncate(path, 0)
assert array[2 * PAGE] == 0
assert three.broken, "and faults are still seen to"
signal.signal(signal.SIGBUS, signal.SIG_IGN)
three.close()
os.kill(os.getpid(), signal.SIGBUS)
assert hits == [1, 1], "a handler that came later stays"
""")  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("options", [(), ("-X", "faulthandler")], ids=["default", "faulthandler"])
def test_watches_of_many_threads_leave_the_earlier_action(tmp_path: Path, options: tuple[str, ...]) -> None:
    done = run(tmp_path, """
path, mapping, array = mapped("a", 4)
before = action()
def hammer():
    for _ in range(3000):
        watched(array).close()
threads = [threading.Thread(target=hammer) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert action() == before
""", *options)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_watch_that_is_dropped_is_closed(tmp_path: Path) -> None:
    done = run(tmp_path, """
path, mapping, array = mapped("a", 4)
before = action()
watch = watched(array)
assert action() != before
del watch
gc.collect()
assert action() == before, "what is mapped there next is not ours"
""")  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_handler_that_is_put_back_late_does_not_become_its_own_predecessor(tmp_path: Path) -> None:
    done = run(tmp_path, """
path, mapping, array = mapped("a", 4)
other_path, other_mapping, other = mapped("b", 4)
watch = watched(array)
faulthandler.enable()
watch.close()
faulthandler.disable()  # this puts back what it found
watch = watched(array)
os.truncate(path, 0)
assert array[0] == 0 and watch.broken
os.truncate(other_path, 0)
signal.alarm(20)
other[0]
""")  # fmt: skip
    assert done.returncode == -signal.SIGBUS, "with SIGALRM: the fault was repeated for ever"


def test_a_later_handler_that_calls_the_earlier_one_is_not_called_for_ever(tmp_path: Path) -> None:
    done = run(tmp_path, """
path, mapping, array = mapped("a", 4)
other_path, other_mapping, other = mapped("b", 4)
watch = watched(array)
kind = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
earlier = kind(action()[0])
later = kind(lambda *given: earlier(*given))
new = raw_action()
ctypes.c_void_p.from_buffer(new).value = ctypes.cast(later, ctypes.c_void_p).value
assert libc.sigaction(signal.SIGBUS, new, None) == 0
os.truncate(path, 0)
assert array[0] == 0 and watch.broken
os.truncate(other_path, 0)
signal.alarm(20)
other[0]
""")  # fmt: skip
    assert done.returncode == -signal.SIGBUS, "with SIGALRM: the fault was repeated for ever"


def test_a_fault_while_the_interpreter_ends_does_not_hang(tmp_path: Path) -> None:
    done = run(tmp_path, """
path, mapping, array = mapped("a", 4)
watch = watched(array)
class Late:
    def __init__(self): self.path, self.array, self.truncate, self.alarm = path, array, os.truncate, signal.alarm
    def __del__(self):
        self.alarm(20)
        self.truncate(self.path, 0)
        self.array[0]
sys.late = Late()
""")  # fmt: skip
    assert done.returncode == -signal.SIGBUS, "with SIGALRM: the fault was repeated for ever"


def test_a_forked_child_is_guarded_and_can_close(tmp_path: Path) -> None:
    done = run(tmp_path, """
path, mapping, array = mapped("a", 4)
spare_path, spare_mapping, spare = mapped("b", 4)
watch = watched(array)
ended = threading.Event()
def hammer():  # most forks meet the lock held
    while not ended.is_set():
        watched(spare).close()
thread = threading.Thread(target=hammer)
thread.start()
os.truncate(path, PAGE)
for _ in range(100):
    child = os.fork()
    if not child:
        signal.alarm(20)
        right = array[PAGE - 1] == 128 and not watch.broken and array[PAGE] == 0 and watch.broken
        watch.close()
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
assert not watch.broken, "each process has its own mark"
assert array[PAGE] == 0 and watch.broken
ended.set()
thread.join()
""")  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_an_interrupt_that_meets_the_handler_neither_kills_nor_hides_the_mark(tmp_path: Path) -> None:
    done = run(tmp_path, """
from functools import partial
from operator import methodcaller
path, mapping, array = mapped("a", 4)
watch = watched(array)
os.truncate(path, 0)
try:
    # One native call that interrupts and then touches: the first Python code to run is the handler's.
    list(map(methodcaller("__call__"), (ctypes.pythonapi.PyErr_SetInterrupt, partial(bytes, memoryview(mapping)))))
except KeyboardInterrupt:
    pass
assert watch.broken
assert bytes(mapping) == bytes(4 * PAGE)
# And one that comes further on in the handler.
from bigmerge.storage import bus_errors
path, mapping, array = mapped("b", 4)
second = watched(array)
os.truncate(path, 0)
real, interrupts = bus_errors._give_zeros, []
def interrupted(address):
    if not interrupts:
        interrupts.append(address)
        raise KeyboardInterrupt
    return real(address)
bus_errors._give_zeros = interrupted
assert array[0] == 0 and second.broken and interrupts
watch.close(), second.close()
""")  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_nothing_is_watched_where_the_platform_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> None:
        raise AssertionError("a handler was installed")

    monkeypatch.setattr(bus_errors, "_SUPPORTED", False)
    monkeypatch.setattr(bus_errors, "_install", never)
    watch = watch_mapping(PAGE, PAGE)
    assert not watch.broken
    watch.close()
    watch.close()
