"""The rows of the merge report, in groups that can be run by themselves."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import LlamaShape, make_llama
from benchmarks.control_group import MemoryGroup
from benchmarks.measuring import (
    Result,
    Runs,
    bare_peak,
    drop_from_cache,
    read_into_cache,
    record,
    run,
    wait_for_quiet,
)

MIB = 1 << 20


@dataclass(frozen=True)
class Row:
    """One figure of the report.

    Attributes:
        reached: the figure; None if it could not be measured.
        target: at most (or, with `at_least`, at least) this; None where there is no target.
        note: what was measured and how.
        raw: every number that went into it.
    """

    name: str
    reached: float | None
    unit: str = "×"
    target: float | None = None
    at_least: bool = False
    note: str = ""
    raw: Mapping[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        if self.reached is None or self.target is None:
            return None
        return self.reached >= self.target if self.at_least else self.reached <= self.target

    def cells(self) -> list[str]:
        """For the printed table."""
        reached = "not measured" if self.reached is None else f"{self.reached:.2f} {self.unit}"
        sign = "≥" if self.at_least else "≤"
        target = "" if self.target is None else f"{sign} {self.target:g} {self.unit}"
        return [self.name, reached, target, {True: "met", False: "not met", None: self.note[:60]}[self.met]]

    def as_json(self) -> dict[str, Any]:
        return {
            "reached": self.reached, "unit": self.unit, "target": self.target, "at_least": self.at_least,
            "met": self.met, "note": self.note, **self.raw,
        }  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What is measured on.

    Attributes:
        directory: where checkpoints are made.
        layers: of the Llama shape.
        runs: alternated runs of everything.
        workers: threads of every contestant.
        mergekit: the mergekit-yaml command; None where it is not installed.
    """

    directory: Path
    layers: int
    runs: int
    workers: int
    mergekit: str | None

    @property
    def shape(self) -> LlamaShape:
        return LlamaShape(layers=self.layers)

    @property
    def root(self) -> Path:
        return self.directory / f"llama-{self.layers}"

    @property
    def out(self) -> Path:
        return self.root / "out"

    @cached_property
    def models(self) -> list[Path]:
        return [make_llama(self.root / f"m{n}", self.shape, seed=n) for n in range(3)]

    @cached_property
    def with_fishers(self) -> list[Path]:
        fishers = [
            make_llama(self.root / f"m{n}-fisher", self.shape, seed=100 + n, dtype="F32", fisher=True)
            for n in range(2)
        ]
        return [*self.models[:2], *fishers]

    def inputs(self, method: str) -> list[Path]:
        return self.with_fishers if method == "fisher" else self.models

    def merge(self, method: str, inputs: Sequence[Path], *extra: str) -> list[str]:
        """The command that merges `inputs`."""
        # Generated Fishers record no sums; normalising would add a measuring pass that real ones do not need.
        normalize = ["--fisher-normalize", "none"] if method == "fisher" else []
        workers = [] if "--workers" in extra else ["--workers", str(self.workers)]
        return [
            sys.executable, "-m", "bigmerge", "merge", "--json", "--profile", "-q", "-m", method, *normalize,
            *workers, "-o", str(self.out), *extra, *map(str, inputs),
        ]  # fmt: skip

    def floor(self, inputs: Sequence[Path], threads: int | None = None) -> list[str]:
        """The command that only moves the bytes."""
        return [
            sys.executable, "-m", "benchmarks.floor", str(threads or self.workers), str(weight_bytes(inputs[:1])),
            str(self.root / "floor.out"), *map(str, inputs),
        ]  # fmt: skip

    def clean(self) -> None:
        """Remove what the last contestant has written."""
        for path in (self.out, Path(f"{self.out}.partial")):
            shutil.rmtree(path, ignore_errors=True)
        (self.root / "floor.out").unlink(missing_ok=True)


def weight_bytes(paths: Sequence[Path]) -> int:
    """Bytes of all weight files."""
    return sum(file.stat().st_size for path in paths for file in path.glob("*.safetensors"))


Contestant = tuple[Sequence[str], Sequence[Path]]


def alternate(
    setting: Setting,
    contestants: Mapping[str, Contestant],
    *,
    cached: bool = False,
    around: Callable[[str], Any] | None = None,
    runs: int | None = None,
) -> dict[str, Runs]:
    """Run every contestant in turn, the order reversed in every other round, from a cold (or full) page cache."""
    found: dict[str, Runs] = {name: Runs() for name in contestants}
    for number in range(runs or setting.runs):
        names = list(contestants) if number % 2 == 0 else list(reversed(contestants))
        for name in names:
            command, inputs = contestants[name]
            setting.clean()
            wait_for_quiet()
            if cached:
                read_into_cache(inputs)
            else:
                drop_from_cache(inputs)
            print(f"  run {number + 1}: {name}", file=sys.stderr)
            prefix = around(name) if around else []
            record(found[name], run([*prefix, *command], inner=_inner))
    setting.clean()
    return found


def _inner(text: str) -> Result:
    """Seconds, and the profile, that a contestant reports of itself."""
    told = json.loads(text) if text.strip().startswith("{") else None
    if told is None:
        return (float(text), None) if text.strip() else (None, None)
    return told["seconds"], told.get("profile")


def _raw(runs: Mapping[str, Runs]) -> dict[str, Any]:
    return {"runs": {name: value.as_json() for name, value in runs.items()}}


def cold(setting: Setting) -> list[Row]:
    """Wall time against the floor from a cold page cache, and peak memory."""
    rows = []
    for method in ("linear", "fisher"):
        inputs = setting.inputs(method)
        runs = alternate(
            setting,
            {
                "floor": (setting.floor(inputs), inputs),
                "direct floor": ([*setting.floor(inputs), "--direct"], inputs),
                "default": (setting.merge(method, inputs), inputs),
                "mmap": (setting.merge(method, inputs, "--io", "mmap"), inputs),
                "pread": (setting.merge(method, inputs, "--io", "pread"), inputs),
                "64MiB": (setting.merge(method, inputs, "--memory", "64MiB"), inputs),
            },
        )
        floor, direct, default = (runs[name].seconds for name in ("floor", "direct floor", "default"))
        rows.append(Row(f"{method}: default / floor, cold", default / floor, target=1.15, raw=_raw(runs),
                        note=f"floor {floor:.2f} s through the page cache, bigmerge {default:.2f} s; "
                             "seconds of the work itself"))  # fmt: skip
        rows.append(Row(f"{method}: default / floor past the page cache, cold", default / direct,
                        note=f"floor {direct:.2f} s with O_DIRECT both ways"))  # fmt: skip
        for io in ("mmap", "pread"):
            rows.append(Row(f"{method}: --io {io} / floor, cold", runs[io].seconds / floor))
        bare = bare_peak()
        peak = max(0, runs["default"].peak_bytes - bare) / MIB
        rows.append(Row(f"{method}: peak above torch", peak, "MiB", 256, note="ru_maxrss of a fresh process"))
        peak = max(0, runs["64MiB"].peak_bytes - bare) / MIB
        rows.append(Row(f"{method}: peak above torch, --memory 64MiB", peak, "MiB", 64))
        ratio = runs["64MiB"].seconds / default
        rows.append(Row(f"{method}: --memory 64MiB / default", ratio, target=1.3))
    return rows


def warm(setting: Setting) -> list[Row]:
    """Gigabytes of input a second for each core, with everything in the page cache."""
    rows = []
    for method in ("linear", "fisher"):
        inputs = setting.inputs(method)
        contestants: dict[str, Contestant] = {}
        for workers in (1, 2):
            for io in ("mmap", "pread"):
                extra = ("--io", io, "--workers", str(workers))
                contestants[f"{io}, {workers}"] = (setting.merge(method, inputs, *extra), inputs)
            contestants[f"copy, {workers}"] = (setting.floor(inputs, workers), inputs)
        runs = alternate(setting, contestants, cached=True)
        size = weight_bytes(inputs)
        for name, value in runs.items():
            rate = size / value.seconds / 1e9 / int(name[-1])
            rows.append(Row(f"{method}: warm, {name} thread(s), per core", rate, "GB/s",
                            raw=_raw({name: value}), note="inputs; output written and synced"))  # fmt: skip
    return rows


def mergekit(setting: Setting) -> list[Row]:
    """mergekit's linear merge of the same models, in its own environment."""
    name = "mergekit / bigmerge, linear, cold"
    if setting.mergekit is None:
        return [Row(name, None, note="mergekit-yaml is not installed; --mergekit PATH")]
    models, command = setting.models, _mergekit_command(setting)
    runs = alternate(
        setting,
        {"bigmerge": (setting.merge("linear", models), models), "mergekit": (command, models)},
    )
    # Whole processes on both sides: mergekit reports no seconds of its own.
    ours, theirs = (statistics.median(runs[who].wall) for who in ("bigmerge", "mergekit"))
    note = f"whole processes: bigmerge {ours:.1f} s, mergekit {theirs:.1f} s"
    peak = runs["mergekit"].peak_bytes / MIB
    return [
        Row(name, theirs / ours, target=4, at_least=True, note=note, raw=_raw(runs)),
        Row("mergekit: peak resident memory", peak, "MiB", note="of the whole process"),
    ]


def _mergekit_command(setting: Setting) -> list[str]:
    """The command that merges the models as `linear` does."""
    assert setting.mergekit is not None
    config = setting.root / "mergekit.yml"
    config.write_text(json.dumps({
        "merge_method": "linear", "dtype": "bfloat16",
        "models": [{"model": str(path.resolve()), "parameters": {"weight": 1 / 3}} for path in setting.models],
    }))  # fmt: skip
    return [setting.mergekit, str(config), str(setting.out), "--lazy-unpickle", "--quiet"]


def cgroup(setting: Setting) -> list[Row]:
    """The same inside a memory control group of 512 MiB, its page cache counted."""
    rows = []
    try:
        group = MemoryGroup(512 * MIB)
    except OSError as error:
        return [Row("512 MiB control group / unlimited", None, note=f"no control group can be made: {error}")]
    with group:
        for method in ("linear", "fisher"):
            inputs = setting.inputs(method)
            command = setting.merge(method, inputs)
            runs = alternate(
                setting,
                {"unlimited": (command, inputs), "limited": (command, inputs)},
                around=lambda name: group.launcher() if name == "limited" else [],
            )
            ratio = runs["limited"].seconds / runs["unlimited"].seconds
            rows.append(Row(f"{method}: in 512 MiB / unlimited, cold", ratio, target=1.3, raw=_raw(runs)))
        if setting.mergekit is not None:
            command = [*group.launcher(), *_mergekit_command(setting)]
            code = subprocess.run(command, capture_output=True, check=False).returncode
            rows.append(Row("mergekit in 512 MiB: exit code", code, "", note="-9: killed for its memory"))
            setting.clean()
    return rows


def scale(setting: Setting) -> list[Row]:
    """Four times the layers: time for each byte, and memory. Two models each, for the disk's sake."""
    large = Setting(setting.directory, 4 * setting.layers, setting.runs, setting.workers, None)
    needed = 3.2 * 2 * large.shape.parameters
    if shutil.disk_usage(setting.directory).free < needed:
        return [
            Row("4 × the parameters: seconds per byte", None, note=f"needs {needed / 1e9:.0f} GB of disk")
        ]
    found = {}
    small_models, runs = setting.models[:2], setting.runs
    large_models = [make_llama(large.root / f"m{n}", large.shape, seed=n) for n in range(2)]
    try:
        for _ in range(runs):
            for name, size, models in (("small", setting, small_models), ("large", large, large_models)):
                one = alternate(size, {name: (size.merge("linear", models), models)}, runs=1)
                found.setdefault(name, Runs()).extend(one[name])
    finally:
        shutil.rmtree(large.root)
    per_byte = {
        name: found[name].seconds / weight_bytes(models) for name, models in (("small", small_models),)
    } | {"large": found["large"].seconds / (2 * 2 * large.shape.parameters)}
    return [
        Row(
            "4 × the parameters: seconds per byte",
            per_byte["large"] / per_byte["small"],
            target=1.1,
            raw=_raw(found),
        ),
        Row(
            "4 × the parameters: peak memory",
            found["large"].peak_bytes / found["small"].peak_bytes,
            target=1.1,
        ),
    ]


def startup(setting: Setting) -> list[Row]:
    """What a small merge costs above importing torch."""
    tiny = LlamaShape(layers=1, hidden=64, intermediate=176, vocabulary=1000, heads=4, key_value_heads=2)
    models = [make_llama(setting.directory / f"tiny-{n}", tiny, seed=n) for n in range(2)]
    runs = alternate(
        setting,
        {
            "torch": ([sys.executable, "-c", "import torch"], []),
            "merge": (setting.merge("linear", models), models),
            "help": ([sys.executable, "-c", "from bigmerge.cli.main import main; import io, contextlib\n"
                      "with contextlib.redirect_stdout(io.StringIO()): main(['--help'])"], []),
        },
        cached=True,
        runs=max(5, setting.runs),
    )  # fmt: skip
    walls = {name: statistics.median(value.wall) for name, value in runs.items()}
    note = f"`import torch` alone: {walls['torch']:.2f} s"
    return [
        Row("start-up: merge of 1 MB above `import torch`", walls["merge"] - walls["torch"], "s", 1.2,
            note=note, raw=_raw(runs)),
        Row("start-up: --help", walls["help"], "s", 0.5),
    ]  # fmt: skip


def processes(setting: Setting) -> list[Row]:
    """Two processes against one, one thread each, everything in the page cache."""
    rows = []
    for method in ("linear", "fisher"):
        inputs = setting.inputs(method)
        contestants: dict[str, Contestant] = {}
        for count in (1, 2):
            extra = ("--workers", "1", "--processes", str(count))
            contestants[f"merge, {count}"] = (setting.merge(method, inputs, *extra), inputs)
            contestants[f"copy, {count}"] = (setting.floor(inputs, count), inputs)
        runs = alternate(setting, contestants, cached=True)
        ratio = runs["merge, 1"].seconds / runs["merge, 2"].seconds
        copy = runs["copy, 1"].seconds / runs["copy, 2"].seconds
        busy = {
            count: statistics.median(
                sum(profile[stage]["seconds"] for stage in ("read", "digest", "compute"))
                for profile in runs[f"merge, {count}"].profiles
            )
            for count in (1, 2)
        }
        note = (
            f"{runs['merge, 1'].seconds:.2f} s and {runs['merge, 2'].seconds:.2f} s of the work; a plain copy by 2 "
            f"threads against 1: {copy:.2f} ×. Memory limits it: reading, digesting and computing the same bytes "
            f"takes {busy[1]:.2f} s of one core, and {busy[2]:.2f} s of two at the same time, added up"
        )
        name = f"{method}: --processes 2 against 1, warm"
        rows.append(Row(name, ratio, target=1.7, at_least=True, raw=_raw(runs), note=note))
    return rows


GROUPS: dict[str, Callable[[Setting], list[Row]]] = {
    "cold": cold,
    "warm": warm,
    "processes": processes,
    "startup": startup,
    "mergekit": mergekit,
    "cgroup": cgroup,
    "scale": scale,
}
