"""The plan of a merge: everything that can be known before any tensor is read.

What the result will be (alignment, layout), what it costs (bytes, memory, disk), and how it is cut into steps.
A plan is data; `bigmerge.merging.engine` carries it out.
"""

from __future__ import annotations

import json
import shutil
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import xxhash

from bigmerge.checkpoints.checkpoint import TensorSpec
from bigmerge.checkpoints.dtypes import FLOATS, byte_count
from bigmerge.checkpoints.fisher_facts import Moments, recorded_moments
from bigmerge.checkpoints.layout import Layout, lay_out
from bigmerge.errors import OutputError, ResourceError
from bigmerge.merging import grid
from bigmerge.merging.alignment import Alignment, Kept, Merged, align
from bigmerge.merging.budget import Budget, Schedule, fit
from bigmerge.merging.recipe import Recipe
from bigmerge.quantities import format_bytes, format_seconds
from bigmerge.storage.residency import are_cold, on_local_disk
from bigmerge.storage.staging import partial_path


@dataclass(frozen=True)
class Step:
    """`count` elements from element `start` of the output tensor number `tensor`."""

    number: int
    tensor: int
    start: int
    count: int


@dataclass(frozen=True)
class Plan:
    """Attributes:
    tensors: every output tensor in the order of the output's files.
    dtypes: output dtype of each of `tensors`.
    schedule: how the run is carried out within its budget.
    memory: the budget's working memory in bytes.
    recorded: companion → for each model, the moments its header records, by tensor name in that file.
    measure: companions whose moments the method needs and a measuring pass has to find.
    """

    recipe: Recipe
    out: Path
    alignment: Alignment
    layout: Layout
    tensors: tuple[Merged | Kept, ...]
    dtypes: tuple[str, ...]
    schedule: Schedule
    memory: int
    disk_free: int
    disk_needed: int
    recorded: Mapping[str, tuple[Mapping[str, Moments], ...]]
    measure: tuple[str, ...]
    step_ends: tuple[int, ...]

    @property
    def step_count(self) -> int:
        return self.step_ends[-1] if self.step_ends else 0

    def step(self, number: int) -> Step:
        """Step `number`, counted over all tensors in output order."""
        tensor = bisect_right(self.step_ends, number)
        first = self.step_ends[tensor - 1] if tensor else 0
        start = (number - first) * grid.STEP
        return Step(number, tensor, start, min(grid.STEP, self.numel(tensor) - start))

    def numel(self, tensor: int) -> int:
        """Elements of the output tensor number `tensor`."""
        entry = self.tensors[tensor]
        return entry.models[0].numel if isinstance(entry, Merged) else entry.spec.numel

    def inputs(self, tensor: int) -> list[TensorSpec]:
        """Everything that is read for the output tensor number `tensor`, in a fixed order."""
        return self.tensors[tensor].inputs

    def input_paths(self) -> list[Path]:
        """Every file that is read."""
        return _input_paths(self.tensors)

    @property
    def read_bytes(self) -> int:
        """Bytes read by the measuring pass and the merge."""
        measured = sum(
            spec.nbytes
            for kind in self.measure
            for entry in self.alignment.merged
            for spec in entry.companions[kind]
        )
        return measured + sum(spec.nbytes for entry in self.tensors for spec in entry.inputs)

    @property
    def transfer_bytes(self) -> int:
        """Bytes that the steps read and write."""
        written = sum(byte_count(dtype, self.numel(number)) for number, dtype in enumerate(self.dtypes))
        return written + sum(spec.nbytes for entry in self.tensors for spec in entry.inputs)

    def step_bytes(self, step: Step) -> int:
        """Bytes that one step reads and writes."""
        end = step.start + step.count
        dtypes = [spec.dtype for spec in self.inputs(step.tensor)] + [self.dtypes[step.tensor]]
        return sum(byte_count(dtype, end) - byte_count(dtype, step.start) for dtype in dtypes)

    @property
    def write_bytes(self) -> int:
        return self.layout.nbytes

    def fingerprint(self) -> str:
        """Of what the result's bytes depend on: equal for plans of the same merge."""
        described = json.dumps(
            [self.recipe.describe(), [(shard.filename, shard.nbytes) for shard in self.layout.shards]],
            sort_keys=True,
        )
        return str(xxhash.xxh3_128(described.encode()).hexdigest())

    def as_json(self) -> dict[str, Any]:
        """What `--dry-run --json` prints."""
        return {
            "recipe": self.recipe.describe(),
            "out": str(self.out),
            "files": [
                {"name": shard.filename, "bytes": shard.nbytes, "tensors": len(shard.starts)}
                for shard in self.layout.shards
            ],
            "merged": len(self.alignment.merged),
            "kept": {entry.name: entry.reason for entry in self.alignment.kept},
            "dropped": dict(self.alignment.dropped),
            "warnings": list(self.alignment.warnings),
            "read_bytes": self.read_bytes,
            "write_bytes": self.write_bytes,
            "peak_memory_bytes": self.schedule.peak_bytes,
            "memory_budget_bytes": self.memory,
            "workers": self.schedule.workers,
            "processes": self.schedule.processes,
            "io": self.schedule.io,
            "direct_output": self.schedule.direct_output,
            "device": self.schedule.device,
            "measuring_pass": list(self.measure),
            "disk_free_bytes": self.disk_free,
            "disk_needed_bytes": self.disk_needed,
            "seconds_at_1GBps": round((self.read_bytes + self.write_bytes) / 1e9, 3),
        }

    def describe(self) -> str:
        """What `--dry-run` prints."""
        recipe = self.recipe
        width = max(len(source.label) for source in recipe.sources)
        lines = [f"{recipe.method.name}: {recipe.method.summary}"]
        for number, source in enumerate(recipe.sources):
            role = "  (target)" if number == recipe.target else ""
            fisher = f"  Fisher {source.fisher.root}" if source.fisher and recipe.method.companions else ""
            lines.append(f"  {source.label:<{width}}  λ {source.weight:g}{fisher}{role}")
        if recipe.base is not None:
            lines.append(f"  base {recipe.base_label}, scale {recipe.scale:g}")
        lines.append(
            f"{len(self.alignment.merged)} tensors merged, {len(self.alignment.kept)} taken from "
            f"{recipe.sources[recipe.target].label}, {len(self.alignment.dropped)} left out"
        )
        lines += describe_exceptions(self.alignment)
        seconds = (self.read_bytes + self.write_bytes) / 1e9
        several = self.schedule.processes > 1
        each = f" in each of {self.schedule.processes} processes" if several else ""
        lines += [
            f"reads {format_bytes(self.read_bytes)}"
            + (f" (a measuring pass over {', '.join(self.measure)} included)" if self.measure else "")
            + f", writes {format_bytes(self.write_bytes)} in {len(self.layout.shards)} file(s); "
            f"about {format_seconds(seconds)} at 1 GB/s",
            f"working memory {format_bytes(self.schedule.peak_bytes)} of {format_bytes(self.memory)}"
            f"{each}, {self.schedule.workers} worker(s), reading by {self.schedule.io}, arithmetic on "
            f"{self.schedule.device}, writing {'past' if self.schedule.direct_output else 'through'} the page cache",
            f"{format_bytes(self.disk_free)} free on the disk",
            f"output {self.out}",
        ]
        return "\n".join(lines)


def describe_exceptions(alignment: Alignment, most: int = 8) -> list[str]:
    """Lines on what was not merged and what should be known, shortened for people."""
    lines = []
    by_reason: dict[str, list[str]] = {}
    for entry in alignment.kept:
        by_reason.setdefault(f"kept, {entry.reason}", []).append(entry.name)
    for name, reason in alignment.dropped.items():
        by_reason.setdefault(f"left out, {reason}", []).append(name)
    for reason, names in by_reason.items():
        more = f" … and {len(names) - most} more" if len(names) > most else ""
        lines.append(f"  {reason}: {', '.join(names[:most])}{more}")
    lines += [f"  warning: {warning}" for warning in alignment.warnings]
    return lines


def make_plan(recipe: Recipe, out: Path, budget: Budget) -> Plan:
    """Plan the merge of `recipe` into the directory `out`.

    Raises:
        AlignmentError: the inputs do not fit together.
        OutputError: the output would take the place of an input.
        ResourceError: the memory budget cannot be kept or the disk is too small.
    """
    _check_apart(recipe, out)
    alignment = align(
        recipe.sources,
        target=recipe.target,
        companions=recipe.method.companions,
        base=recipe.base,
        selection=recipe.selection,
    )
    target_source = recipe.sources[recipe.target]
    if target_source.checkpoint.config is None:
        missing = f"{target_source.label} has no config.json beside it, so the output will hold weights only"
        alignment = replace(alignment, warnings=(*alignment.warnings, missing))
    by_name: dict[str, Merged | Kept] = {entry.name: entry for entry in alignment.merged}
    by_name |= {entry.name: entry for entry in alignment.kept}
    target = target_source.checkpoint.tensors
    shapes = {name: (_output_dtype(target[name], recipe.dtype), target[name].shape) for name in by_name}
    layout = lay_out(shapes, recipe.shard_bytes, metadata={"format": "pt"})
    tensors = tuple(by_name[name] for name in layout.tensors)
    dtypes = tuple(dtype for dtype, _ in layout.tensors.values())
    numels = [target[name].numel for name in layout.tensors]
    step_ends = tuple(accumulate(-(-numel // grid.STEP) for numel in numels))
    recorded, measure = _recorded_moments(recipe, alignment)
    cold = budget.io is None and are_cold(_input_paths(tensors))
    parent = next(parent for parent in out.absolute().parents if parent.is_dir())
    schedule = fit(
        recipe, tensors, dtypes, step_ends[-1] if step_ends else 0, budget,
        cold=cold, local_output=on_local_disk(parent),
    )  # fmt: skip
    free = shutil.disk_usage(parent).free
    held = _allocated(partial_path(out))
    needed = layout.nbytes + (16 << 20)
    plan = Plan(
        recipe, out, alignment, layout, tensors, dtypes, schedule, budget.memory,
        free, needed, recorded, measure, step_ends,
    )  # fmt: skip
    if needed > free + held:
        raise ResourceError(
            f"{parent}: the output needs {format_bytes(needed)}, the disk has {format_bytes(free + held)} free",
            hint="free space or choose an output on another disk",
            needed=needed,
            free=free,
        )
    return plan


def _recorded_moments(
    recipe: Recipe, alignment: Alignment
) -> tuple[dict[str, tuple[Mapping[str, Moments], ...]], tuple[str, ...]]:
    """What headers record of the companions that the method wants moments of, and which must be measured."""
    recorded: dict[str, tuple[Mapping[str, Moments], ...]] = {}
    measure = []
    for kind in recipe.method.statistics():
        fishers = [source.fisher for source in recipe.sources]
        recorded[kind] = tuple(recorded_moments(fisher) for fisher in fishers if fisher is not None)
        if any(
            spec.name not in moments
            for entry in alignment.merged
            for spec, moments in zip(entry.companions[kind], recorded[kind], strict=True)
        ):
            measure.append(kind)
    return recorded, tuple(measure)


def _input_paths(tensors: Sequence[Merged | Kept]) -> list[Path]:
    return list(dict.fromkeys(spec.path for entry in tensors for spec in entry.inputs))


def _output_dtype(spec: TensorSpec, asked: str | None) -> str:
    return asked if asked is not None and spec.dtype in FLOATS else spec.dtype


def _check_apart(recipe: Recipe, out: Path) -> None:
    places = [out.resolve(), partial_path(out.absolute()).resolve()]
    inputs = [source.checkpoint for source in recipe.sources]
    inputs += [source.fisher for source in recipe.sources if source.fisher is not None]
    inputs += [recipe.base] if recipe.base is not None else []
    for checkpoint in inputs:
        for file in checkpoint.files:
            above = {file.resolve(), *file.absolute().parents, *file.resolve().parents}
            if any(place in above for place in places):
                raise OutputError(
                    f"{out}: writing it would replace an input of the merge, {file}",
                    hint="choose another output",
                    file=str(file),
                )


def _allocated(directory: Path) -> int:
    """Bytes that the files of an earlier, unfinished run occupy already."""
    if not directory.is_dir():
        return 0
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())
