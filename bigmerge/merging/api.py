"""`bigmerge.merge` and `bigmerge.plan_merge`: merging as a Python API. The command line calls the same."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigmerge.checkpoints.arguments import resolve_model
from bigmerge.checkpoints.dtypes import FLOATS, dtype_name
from bigmerge.errors import UsageError
from bigmerge.merging.alignment import Selection
from bigmerge.merging.budget import DEFAULT_MEMORY, Budget
from bigmerge.merging.plan import Plan, describe_exceptions, make_plan
from bigmerge.merging.profile import Profile
from bigmerge.merging.recipe import DEFAULT_SHARD_BYTES, Recipe
from bigmerge.merging.sources import Grouping, collect
from bigmerge.methods.base import METHODS, build_method
from bigmerge.processes import joined_local_world_size, joined_world_size
from bigmerge.quantities import format_bytes, format_seconds, parse_bytes
from bigmerge.storage.reading import IO_KINDS
from bigmerge.storage.staging import Staging, check_free

log = logging.getLogger("bigmerge.merge")


@dataclass(frozen=True)
class MergeResult:
    """What a merge did.

    Attributes:
        out: the finished directory.
        merged: names of the merged tensors.
        kept: name → why the tensor was taken from the target.
        dropped: name → why the tensor is not in the output.
        warnings: what the user should know.
        seconds: wall time of reading, merging and writing.
        bytes_read, bytes_written: of this and earlier, interrupted runs together.
        profile: where the time of this run went.
    """

    out: Path
    merged: tuple[str, ...]
    kept: Mapping[str, str]
    dropped: Mapping[str, str]
    warnings: tuple[str, ...]
    seconds: float
    bytes_read: int
    bytes_written: int
    recipe: Mapping[str, Any]
    profile: Profile

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "out": str(self.out),
            "merged": len(self.merged),
            "kept": dict(self.kept),
            "dropped": dict(self.dropped),
            "warnings": list(self.warnings),
            "seconds": round(self.seconds, 3),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "recipe": dict(self.recipe),
        }


def plan_merge(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    models: Sequence[str | Path] = (),
    weights: Sequence[float] = (),
    fishers: Sequence[str | Path] = (),
    method: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    target: str | None = None,
    base: str | Path | None = None,
    scale: float = 1.0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    strict: bool = False,
    merge_heads: bool = False,
    dtype: str | None = None,
    shard_size: int | str = DEFAULT_SHARD_BYTES,
    memory: int | str = DEFAULT_MEMORY,
    workers: int | None = None,
    io: str | None = None,
    device: str = "cpu",
    processes: int = 1,
    method_options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Plan:
    """Everything about a merge that is known from headers: what it will produce and what it will cost.

    Takes the arguments of `merge`, and as `method_options` parameters by method, of which only those of the
    method in use may be given (the command line's form of `parameters`).

    Raises:
        UsageError: arguments that contradict each other.
        InputError: models or Fishers that are malformed or do not fit together.
        ResourceError: the memory budget cannot be kept, or the disk is too small.
    """
    grouping = collect(sources, models, weights, fishers)
    chosen = method or _default_method(grouping)
    if not math.isfinite(scale):
        raise UsageError(f"--scale {scale:g} is no finite number")
    if scale != 1.0 and base is None:
        raise UsageError("--scale needs the --base that the merged model is moved away from")
    budget = _budget(memory, workers, io, device, processes)
    output_dtype = None
    if dtype is not None:
        try:
            output_dtype = dtype_name(dtype)
        except KeyError:
            output_dtype = dtype
        if output_dtype not in FLOATS:
            raise UsageError(
                f"{dtype!r} is no output dtype", hint="one of float64, float32, float16, bfloat16, "
                "float8_e4m3fn, float8_e5m2"
            )  # fmt: skip
    for other in method_options or {}:
        if other != chosen:
            raise UsageError(f"options of the method {other!r} were given, but the method is {chosen!r}")
    built = build_method(chosen, {**(method_options or {}).get(chosen, {}), **(parameters or {})})
    built.check([source.weight for source in grouping.sources])
    base_model = resolve_model(base) if base is not None else None
    recipe = Recipe(
        sources=grouping.sources,
        method=built,
        target=_target(grouping, target),
        base=base_model.checkpoint if base_model is not None else None,
        base_label=base_model.label if base_model is not None else None,
        scale=float(scale),
        selection=Selection(tuple(include), tuple(exclude), strict, merge_heads),
        dtype=output_dtype,
        shard_bytes=parse_bytes(shard_size),
    )
    return make_plan(recipe, Path(out), budget)


def merge(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: bool = False,
    **options: Any,
) -> MergeResult:
    """Merge models, tensor by tensor, into the directory `out`.

    Args:
        sources: model directories, weight files (shards of one model are recognised), Fishers, hub names.
        out: the directory to write; it appears when it is complete.
        overwrite: replace an existing `out`.
        progress: show a progress bar on standard error.
        models: more models, each to be paired with one of `fishers` explicitly.
        weights: λ for every model, in the order of `sources` and then `models`; default: all 1.
        fishers: a Fisher for each of `models`.
        method: a name from `bigmerge.methods`; default "fisher" if every model has a Fisher, else "linear".
        parameters: the method's parameters by name.
        target: label of the model that unmergeable tensors, dtypes, config and tokenizer come from; default:
            the first.
        base, scale: the result is base + scale · (merged − base).
        include, exclude: globs on tensor names.
        strict: make any tensor that cannot be merged an error.
        merge_heads: merge task heads of equal shape.
        dtype: of the output's floating tensors; default: the target's.
        shard_size: most bytes of data in one output file.
        memory: working memory beyond the interpreter and torch; bytes or text like "256MiB".
        workers: most threads of each process; default: the cores, divided among the processes.
        io: how inputs are read: "mmap", "pread" or "direct"; see `bigmerge.storage.reading`. Default: "direct"
            if they are on a local disk and not in the page cache, else "mmap"; "pread" where that lets more
            workers fit into `memory`.
        device: where the arithmetic is done: "cpu", or a GPU such as "cuda" or "cuda:1".
        processes: how many processes share the work on this machine; `memory` is what each may use.

    Raises:
        UsageError, InputError, ResourceError: see `plan_merge`.
        OutputError: `out` exists, contains an input, is being written by another process, or the disk refuses.
        ResumeError: an unfinished run of another recipe is there, or inputs have changed since it.
        Interrupted: Ctrl-C; the same call goes on.
    """
    check_free(Path(out), overwrite=overwrite)
    return execute_plan(plan_merge(sources, out, **options), overwrite=overwrite, progress=progress)


def execute_plan(plan: Plan, *, overwrite: bool = False, progress: bool = False) -> MergeResult:
    """Carry out a plan from `plan_merge`; see `merge`."""
    from bigmerge.merging.execution import execute
    from bigmerge.merging.finishing import finish
    from bigmerge.merging.ranks import execute_among_ranks

    started = time.monotonic()
    for warning in plan.alignment.warnings:
        log.warning("%s", warning)
    if joined_world_size() > 1:
        profile = execute_among_ranks(plan, overwrite=overwrite, show_progress=progress)
    else:
        with Staging(plan.out, plan.recipe.describe(), overwrite=overwrite) as staging:
            records, profile = execute(plan, staging, show_progress=progress)
            finish(plan, records, staging.output)
            staging.publish()
    return MergeResult(
        out=plan.out,
        merged=tuple(entry.name for entry in plan.alignment.merged),
        kept={entry.name: entry.reason for entry in plan.alignment.kept},
        dropped=plan.alignment.dropped,
        warnings=plan.alignment.warnings,
        seconds=time.monotonic() - started,
        bytes_read=plan.read_bytes,
        bytes_written=plan.write_bytes,
        recipe=plan.recipe.describe(),
        profile=profile,
    )


def describe_result(result: MergeResult, plan: Plan) -> str:
    """A few lines on a finished merge, for people."""
    moved = result.bytes_read + result.bytes_written
    return "\n".join(
        [
            f"{result.out}: {len(result.merged)} tensors merged by {plan.recipe.method.name}, "
            f"{len(result.kept)} taken from {plan.recipe.sources[plan.recipe.target].label}",
            *describe_exceptions(plan.alignment),
            f"read {format_bytes(result.bytes_read)}, wrote {format_bytes(result.bytes_written)} in "
            f"{format_seconds(result.seconds)} ({format_bytes(moved / max(result.seconds, 1e-9))}/s)",
        ]
    )


def _default_method(grouping: Grouping) -> str:
    with_fisher = [source.label for source in grouping.sources if source.fisher is not None]
    if len(with_fisher) == len(grouping.sources):
        return METHODS.get("fisher").name
    if with_fisher:
        lacking = [source.label for source in grouping.sources if source.fisher is None]
        raise UsageError(
            f"some models have a Fisher and others none: {', '.join(lacking)}; the arguments were grouped as\n    "
            + grouping.describe(),
            hint="measure the missing ones with `bigmerge fisher`, or say --method linear",
            without_fisher=lacking,
        )
    return METHODS.get("linear").name


def _budget(memory: int | str, workers: int | None, io: str | None, device: str, processes: int) -> Budget:
    if workers is not None and workers < 1:
        raise UsageError(f"{workers} workers cannot work", hint="give --workers 1 or more")
    if processes < 1:
        raise UsageError(f"{processes} processes cannot work", hint="give --processes 1 or more")
    if joined_world_size() > 1:
        if processes > 1:
            raise UsageError(
                "--processes starts processes of its own, but a launcher has started this one among others",
                hint="leave out --processes",
            )
        workers = workers or max(1, len(os.sched_getaffinity(0)) // joined_local_world_size())
    kinds = [kind for kind in IO_KINDS if kind == io]
    if io is not None and not kinds:
        raise UsageError(f"{io!r} is no way of reading files", hint=f"--io {' or '.join(IO_KINDS)}")
    if device != "cpu":
        _check_device(device)
    return Budget(parse_bytes(memory), workers, kinds[0] if kinds else None, device, processes)


def _check_device(name: str) -> None:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"{name!r} is no device", hint="--device cpu or --device cuda") from None
    if device.type != "cuda":
        raise UsageError(f"arithmetic on {device.type!r} is not supported", hint="--device cpu or cuda")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise UsageError(f"--device {name}: this machine has {count} usable GPUs", hint="--device cpu")


def _target(grouping: Grouping, wanted: str | None) -> int:
    """Position of the model whose label, or whose path, is `wanted`."""
    if wanted is None:
        return 0
    names = [source.label for source in grouping.sources]
    tail = wanted.rstrip("/").rpartition("/")[2]
    roots = [source.checkpoint.root.resolve() for source in grouping.sources]
    for candidates in (
        [n for n, name in enumerate(names) if name == wanted],
        [n for n, root in enumerate(roots) if root == Path(wanted).resolve()],
        [n for n, name in enumerate(names) if name == tail],
    ):
        if len(candidates) == 1:
            return candidates[0]
    raise UsageError(
        f"--target {wanted!r} names none of the models", hint=f"they are called {', '.join(names)}"
    )
