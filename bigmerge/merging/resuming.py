"""What an earlier, interrupted run has finished, and whether it may be trusted.

OUT.partial/journal*            finished steps with digests of what they read and wrote
OUT.partial/inputs.json         size and times of every input file when those steps were done
OUT.partial/moments-KIND.json   what the measuring pass found

A step counts if its output is stored as the journal says, and if what it read is still what the inputs hold.
All others are simply done again: the result depends on the inputs as they are now, and on nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from pathlib import Path

import xxhash

from bigmerge.checkpoints.checkpoint import TensorSpec, read_json_object
from bigmerge.checkpoints.dtypes import byte_count
from bigmerge.errors import CheckpointError
from bigmerge.merging import grid
from bigmerge.merging.measure import MOMENTS
from bigmerge.merging.plan import Plan, Step
from bigmerge.merging.records import StepRecords
from bigmerge.merging.windows import WindowReader
from bigmerge.progress import progress_bar
from bigmerge.storage.inputs import InputFiles
from bigmerge.storage.journal import Entry, Journal, rewrite_journal
from bigmerge.storage.writing import CheckpointWriter, output_errors, sync_directory, write_json

log = logging.getLogger("bigmerge.merge")

_INPUTS = "inputs.json"


class Earlier:
    """What earlier runs of `plan` left in `scratch`. To be made before anything else is done.

    Attributes:
        changed: resolved paths of the input files that are not, by size and times, what those runs have read.

    Raises:
        OutputError: the disk refuses.
    """

    def __init__(self, plan: Plan, scratch: Path) -> None:
        self._plan = plan
        self._scratch = scratch
        self._stamps = _stamps(plan)
        record = scratch / _INPUTS
        known = read_json_object(record) if record.exists() else {}
        self.changed = {path for path, stamp in self._stamps.items() if known and known.get(path) != stamp}
        if not known:
            write_json(record, self._stamps)
        if self.changed:
            _set_moments_aside(scratch)

    def take_over(
        self, files: InputFiles, writer: CheckpointWriter, records: StepRecords, *, show_progress: bool
    ) -> int:
        """Record the steps that count; returns the bytes that they read and wrote.

        To be called after the measuring pass and while nobody else writes.

        Raises:
            CheckpointError: an input cannot be read.
            OutputError: the disk refuses.
        """
        plan = self._plan
        entries = read_journals(self._scratch, plan.step_count)
        remeasured = _measured_otherwise(self._scratch)
        check = _InputCheck(plan, files, self.changed)
        trusted: list[Entry] = []
        moved = 0
        total = sum(plan.step_bytes(plan.step(number)) for number in entries)
        with progress_bar(
            total=total, unit="B", desc="checking", show=show_progress and bool(entries)
        ) as bar:
            for entry in entries.values():
                step = plan.step(entry.number)
                nbytes = plan.step_bytes(step)
                bar.update(nbytes)
                if remeasured or not check.holds(step, entry):
                    continue
                if _stored_digest(plan, step, writer) == entry.output:
                    trusted.append(entry)
                    records.add(entry)
                    moved += nbytes
        if entries:
            log.info("going on: %d of %d steps were already stored", len(trusted), plan.step_count)
        if remeasured:
            log.warning("what was measured of the inputs has changed; all steps are done again")
        elif check.different:
            log.warning("changed since the interrupted run: %s", ", ".join(sorted(check.different)))
        if len(trusted) < len(entries):
            log.warning("%d steps cannot be trusted; they are done again", len(entries) - len(trusted))
        if self.changed or remeasured or len(trusted) < len(entries):
            # In this order: a run that ends in between checks everything once more.
            rewrite_journal(self._scratch / "journal", trusted)
            _remove(path for path in journal_paths(self._scratch) if path.name != "journal")
            _remove(self._scratch.glob(MOMENTS.format("*") + ".stale"))
            write_json(self._scratch / _INPUTS, self._stamps)
        return moved

    def check_unchanged(self) -> None:
        """Check, when all is done, that no input changed while it was read.

        Raises:
            CheckpointError: one did. The next run looks at what was read from it again.
        """
        now = _stamps(self._plan, missing_ok=True)
        changed = sorted(path for path, stamp in self._stamps.items() if now[path] != stamp)
        if changed:
            record = self._scratch / _INPUTS
            write_json(record, {**self._stamps, **dict.fromkeys(changed)})
            raise CheckpointError(
                f"{', '.join(changed)}: changed while it was being merged",
                hint="run the same command again: only what was read from the changed content is done again",
                files=changed,
            )


def journal_paths(scratch: Path) -> list[Path]:
    """The journals of all processes that have worked in `scratch`."""
    return sorted(path for path in scratch.glob("journal*") if not path.name.endswith(".tmp"))


def read_journals(scratch: Path, step_count: int) -> dict[int, Entry]:
    """Every whole entry of all journals in `scratch`, by step. What a kill has torn is cut off."""
    entries: dict[int, Entry] = {}
    for path in journal_paths(scratch):
        with Journal(path) as journal:
            entries |= {entry.number: entry for entry in journal.replay() if entry.number < step_count}
    return entries


class _InputCheck:
    """Compares what changed files hold with what the journal says was read from them."""

    def __init__(self, plan: Plan, files: InputFiles, changed: Collection[str]) -> None:
        self._plan = plan
        self._changed = changed
        self._reader = WindowReader(files, [8 * grid.SUM_BLOCK])
        self.different: set[str] = set()

    def holds(self, step: Step, entry: Entry) -> bool:
        specs = self._plan.inputs(step.tensor)
        if len(specs) != len(entry.inputs):
            return False
        for spec, digest in zip(specs, entry.inputs, strict=True):
            path = str(spec.path.resolve()) if self._changed else ""
            if path in self._changed and self._digest(spec, step) != digest:
                self.different.add(path)
                return False
        return True

    def _digest(self, spec: TensorSpec, step: Step) -> bytes:
        found = xxhash.xxh3_64()
        end = step.start + step.count
        for first in range(step.start, end, grid.SUM_BLOCK):
            window = self._reader.read(0, spec, first, min(grid.SUM_BLOCK, end - first))
            found.update(window.raw)
            self._reader.release(window)
        return found.digest()


def _stored_digest(plan: Plan, step: Step, writer: CheckpointWriter) -> bytes:
    dtype = plan.dtypes[step.tensor]
    start = byte_count(dtype, step.start)
    nbytes = byte_count(dtype, step.start + step.count) - start
    return bytes(xxhash.xxh3_128(writer.read(plan.tensors[step.tensor].name, start, nbytes)).digest())


def _set_moments_aside(scratch: Path) -> None:
    """Have them measured again, but remember what the steps so far were done with."""
    for path in scratch.glob(MOMENTS.format("*")):
        aside = path.with_name(path.name + ".stale")
        with output_errors(path):
            if aside.exists():
                path.unlink()
            else:
                path.rename(aside)
    sync_directory(scratch)


def _measured_otherwise(scratch: Path) -> bool:
    """Whether any moments are others than those that earlier steps were done with."""
    for path in scratch.glob(MOMENTS.format("*") + ".stale"):
        now = path.with_name(path.name.removesuffix(".stale"))
        if not now.exists() or now.read_bytes() != path.read_bytes():
            return True
    return False


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        with output_errors(path):
            path.unlink()


def _stamps(plan: Plan, *, missing_ok: bool = False) -> dict[str, list[int] | None]:
    """Size and times of every input file, by its resolved path. Nobody can set a change time back."""
    paths = {spec.path.resolve() for tensor in range(len(plan.tensors)) for spec in plan.inputs(tensor)}
    stamps: dict[str, list[int] | None] = {}
    for path in sorted(paths):
        try:
            status = path.stat()
        except FileNotFoundError as error:
            if not missing_ok:
                raise CheckpointError(f"{path}: has vanished", file=str(path)) from error
            stamps[str(path)] = None
        else:
            stamps[str(path)] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    return stamps
