"""bigmerge.storage.bus_errors: real faults in mapped files, in processes of their own that would die of them."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

PREAMBLE = """
import ctypes, mmap, os, random, signal, sys, threading
import numpy as np, torch, xxhash
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
"""


def run(tmp_path: Path, program: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-c", PREAMBLE + program, str(tmp_path / "file")],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def test_what_is_gone_reads_as_zeros_and_is_known(tmp_path: Path) -> None:
    done = run(tmp_path, """
path, mapping, array = mapped("a", 100)
other_path, other_mapping, other = mapped("b", 100)
watch, second = watched(array), watched(other)
os.truncate(path, 40 * PAGE)
assert int(array[:40 * PAGE].astype(np.int64).sum()) == 40 * PAGE // 128 * (128 * 129 // 2)
assert not watch.broken
assert bytes(memoryview(mapping)[60 * PAGE : 61 * PAGE]) == bytes(PAGE)
assert watch.broken and not second.broken
assert array[50 * PAGE] == 0
assert watch.broken
xxhash.xxh3_64(memoryview(mapping)).digest()
assert int(torch.from_numpy(array).to(torch.float32)[40 * PAGE:].sum()) == 0
assert bytes(memoryview(mapping)[:128]) == bytes(range(1, 129))
os.truncate(path, 100 * PAGE)
assert watch.broken and not second.broken
assert int(other.min()) == 1
watch.close(), second.close()
""")  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_several_threads_in_native_code(tmp_path: Path) -> None:
    done = run(tmp_path, """
generator = random.Random(0)
for round in range(150):
    path, mapping, array = mapped("a", 256)
    watch = watched(array)
    tensor = torch.from_numpy(array)
    start = threading.Barrier(5)
    def read():
        start.wait()
        for _ in range(3):
            tensor.to(torch.float32).sum(), xxhash.xxh3_64(memoryview(mapping)).digest()
    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    start.wait()
    size = generator.randrange(255) * PAGE
    os.truncate(path, size)
    for thread in threads:
        thread.join()
    int(array[-1])
    assert watch.broken
    watch.close()
""")  # fmt: skip
    assert done.returncode == 0, done.stderr


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


def test_the_handler_comes_and_goes_with_the_watches(tmp_path: Path) -> None:
    done = run(tmp_path, """
hits = []
signal.signal(signal.SIGBUS, lambda *_: hits.append(1))
path, mapping, array = mapped("a", 4)
one, two = watched(array[:PAGE]), watched(array[PAGE:])
watch_mapping(0, 0).close()
one.close(), one.close(), two.close()
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
