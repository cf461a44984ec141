"""Runs the real commands on the fine-tuned models, echoing each before it starts."""

from __future__ import annotations

import dataclasses
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.demo import files
from benchmarks.demo.settings import Merging, Task
from bigmerge.errors import BigmergeError


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the demo's files lie below its directory `root`."""

    root: Path

    @property
    def base(self) -> Path:
        """The initialisation that all parents share."""
        return self.root / "base" / "minilm"

    @property
    def shards(self) -> Path:
        """Parents and their Fishers side by side."""
        return self.root / "shards"

    def parent(self, task: Task) -> Path:
        """The model that was fine-tuned on `task`."""
        return self.shards / task.name

    def fisher(self, task: Task) -> Path:
        """The Fisher of `parent(task)`, under the name by which `bigmerge merge` pairs the two."""
        return self.shards / f"{task.name}-fisher"

    def texts(self, task: Task, part: str) -> Path:
        """The JSON lines of one split of `task`."""
        return self.root / "data" / f"{task.name}-{part}.jsonl"

    def merged(self, variant: Variant) -> Path:
        """The output of one merge."""
        return self.root / "merged" / variant.name


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to merge: its directory name, its row's title, and whether it needs Fishers or a base."""

    name: str
    title: str
    fisher: bool
    scaled: bool = False


def variants(merging: Merging) -> tuple[Variant, ...]:
    """The merges that the demo compares, the plain average first.

    The scale is applied with and without Fishers, so that what it does isn't taken for what Fishers do.
    """
    scale = f", scale {merging.scale:g}"
    return (
        Variant("average", "plain average", fisher=False),
        Variant("fisher", "Fisher", fisher=True),
        Variant("average-scaled", f"plain average{scale}", fisher=False, scaled=True),
        Variant("fisher-scaled", f"Fisher{scale}", fisher=True, scaled=True),
    )


@dataclasses.dataclass(frozen=True)
class Done:
    """A command that succeeded, as it was typed, and its wall time in seconds."""

    command: str
    seconds: float


def fisher_command(layout: Layout, task: Task, merging: Merging) -> str:
    """The shell command that measures the Fisher of the task's parent on its training texts."""
    return (
        f"{_program()} fisher {_quote(layout.parent(task))} --dataset {_quote(layout.texts(task, 'train'))}"
        f" --num-examples {merging.fisher_examples} --max-length {task.max_length}"
        f" --num-processes {merging.processes} --cpu -o {_quote(layout.fisher(task))}"
    )


def merge_command(layout: Layout, variant: Variant, merging: Merging) -> str:
    """The shell command that merges everything in `layout.shards` in one way."""
    options = "" if variant.fisher else " --method linear"
    if variant.scaled:
        options += f" --base {_quote(layout.base)} --scale {merging.scale:g}"
    return f"{_program()} merge {_quote(layout.shards)}/*{options} -o {_quote(layout.merged(variant))}"


def measure_fishers(layout: Layout, tasks: Sequence[Task], merging: Merging) -> list[Done]:
    """Measure every parent's Fisher anew, after removing all but the parents from `layout.shards`.

    Whatever lay there (earlier Fishers, what an interrupted run left, the model of a task that is no longer
    among `tasks`) would be merged too.
    """
    parents = {layout.parent(task) for task in tasks}
    for path in sorted(layout.shards.iterdir()):
        if path not in parents:
            files.remove(path)
    return [run(fisher_command(layout, task, merging)) for task in tasks]


def merge_all(layout: Layout, merging: Merging) -> dict[str, Done]:
    """Make every variant anew; variant name → its command."""
    done = {}
    files.remove(layout.root / "merged")
    for variant in variants(merging):
        done[variant.name] = run(merge_command(layout, variant, merging))
    return done


def run(command: str) -> Done:
    """Echo `command` on standard error, run it in a shell, and send all that it prints there too.

    Raises:
        BigmergeError: it failed; what it said stands above on standard error.
    """
    print(f"\n$ {command}", file=sys.stderr, flush=True)
    started = time.perf_counter()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    code = subprocess.run(command, shell=True, stdout=sys.stderr, env=environment, check=False).returncode
    if code:
        raise BigmergeError(f"the command above ended with exit code {code}", command=command, code=code)
    return Done(command, time.perf_counter() - started)


def _program() -> str:
    """The installed `bigmerge` of the Python that runs the demo."""
    script = Path(sys.executable).with_name("bigmerge")
    if not script.exists():
        return f"{_quote(Path(sys.executable))} -m bigmerge"
    return _quote(script)


def _quote(path: Path) -> str:
    """`path` for the shell, relative to the current directory where it lies below it."""
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return shlex.quote(str(path))
