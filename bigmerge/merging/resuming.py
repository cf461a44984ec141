"""Going on after an interruption: what the journal claims is looked at again before it is trusted."""

from __future__ import annotations

import logging
from pathlib import Path

import xxhash

from bigmerge.checkpoints.checkpoint import read_json_object
from bigmerge.checkpoints.dtypes import byte_count
from bigmerge.errors import ResumeError
from bigmerge.merging import grid
from bigmerge.merging.plan import Plan, Step
from bigmerge.merging.records import StepRecords
from bigmerge.merging.windows import WindowReader
from bigmerge.progress import progress_bar
from bigmerge.storage.inputs import InputFiles
from bigmerge.storage.journal import Entry, Journal
from bigmerge.storage.writing import CheckpointWriter, write_json

log = logging.getLogger("bigmerge.merge")


def replay(
    plan: Plan,
    journal: Journal,
    writer: CheckpointWriter,
    files: InputFiles,
    records: StepRecords,
    scratch: Path,
    *,
    show_progress: bool,
) -> int:
    """Take over the steps that an earlier run finished; returns the bytes that they read and wrote.

    A step counts if the stored output has the recorded digest. Inputs whose size or time stamp changed are read
    again for the steps that count.

    Raises:
        ResumeError: an input's content is not what the earlier run read.
    """
    entries = [entry for entry in journal.replay() if entry.number < plan.step_count]
    stamps = _stamps(plan)
    record = scratch / "inputs.json"
    earlier = read_json_object(record) if record.exists() else {}
    changed = {path for path, stamp in stamps.items() if earlier.get(path) != stamp}
    moved = damaged = 0
    total = sum(plan.step_bytes(plan.step(entry.number)) for entry in entries)
    with progress_bar(total=total, unit="B", desc="checking", show=show_progress and bool(entries)) as bar:
        for entry in entries:
            step = plan.step(entry.number)
            if changed:
                _check_inputs(plan, step, entry, changed, files, scratch)
            if _stored_digest(plan, step, writer) == entry.output:
                records.add(entry)
                moved += plan.step_bytes(step)
            else:
                damaged += 1
            bar.update(plan.step_bytes(step))
    if entries:
        log.info("going on: %d of %d steps were already stored", int(records.done.sum()), plan.step_count)
    if damaged:
        log.warning("%d steps were not stored as the journal says; they are done again", damaged)
    if changed:
        write_json(record, stamps)
    return moved


def _stored_digest(plan: Plan, step: Step, writer: CheckpointWriter) -> bytes:
    dtype = plan.dtypes[step.tensor]
    start = byte_count(dtype, step.start)
    nbytes = byte_count(dtype, step.start + step.count) - start
    return bytes(xxhash.xxh3_128(writer.read(plan.tensors[step.tensor].name, start, nbytes)).digest())


def _check_inputs(
    plan: Plan, step: Step, entry: Entry, changed: set[str], files: InputFiles, scratch: Path
) -> None:
    for spec, digest in zip(plan.inputs(step.tensor), entry.inputs, strict=True):
        if str(spec.path.resolve()) not in changed:
            continue
        found = xxhash.xxh3_64()
        reader = WindowReader(files, slots=1, window_bytes=byte_count(spec.dtype, grid.BLOCK))
        for first in range(step.start, step.start + step.count, grid.BLOCK):
            window = reader.read(0, spec, first, min(grid.BLOCK, step.start + step.count - first))
            found.update(window.raw)
            reader.release(window)
        if found.digest() != digest:
            raise ResumeError(
                f"{spec.path}: tensor {spec.name!r} has changed since the interrupted run read it",
                hint=f"put the file back, or remove {scratch} to start again",
                file=str(spec.path),
                tensor=spec.name,
            )


def _stamps(plan: Plan) -> dict[str, list[int]]:
    """Size and time stamp of every input file, by its resolved path."""
    paths = {spec.path.resolve() for tensor in range(len(plan.tensors)) for spec in plan.inputs(tensor)}
    return {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(paths)}
