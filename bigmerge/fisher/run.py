"""One estimate from beginning to end, as one of its processes runs it."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bigmerge import __version__
from bigmerge.errors import OutputError, ResourceError
from bigmerge.fisher.batching import BatchLimits, make_batches
from bigmerge.fisher.device_memory import device_memory
from bigmerge.fisher.engines.base import ENGINES, Engine
from bigmerge.fisher.engines.choice import choose_engine
from bigmerge.fisher.estimate import Examples, add_examples
from bigmerge.fisher.interruption import StopRequest
from bigmerge.fisher.output import mean_values, write_fisher
from bigmerge.fisher.prepare import (
    Prepared,
    check_columns_count,
    check_scorable,
    measure,
    prepare,
)
from bigmerge.fisher.self_check import self_check
from bigmerge.fisher.settings import FisherSettings
from bigmerge.fisher.state import Progress, SavedState
from bigmerge.processes import Group, Notices
from bigmerge.progress import progress_bar
from bigmerge.quantities import format_bytes
from bigmerge.storage.staging import Staging, check_free

logger = logging.getLogger("bigmerge.fisher")


def run(settings: FisherSettings, *, parent: int | None = None) -> dict[str, Any]:
    """Estimate a Fisher as one process of however many there are (see `Group`) and write it.

    Args:
        parent: id of the launching process; when it dies, stop and save the state. None: there is none.

    Returns:
        On the main process what was done, as plain values; on the others an empty dictionary.

    Raises:
        BigmergeError: the same error on every process.
    """
    group = Group(cpu=settings.processes.cpu)
    try:
        with contextlib.ExitStack() as held:
            result = _Run(settings, group, held, parent).result()
        group.settle()
        return result
    finally:
        group.close()


def describe(settings: FisherSettings, processes: int) -> dict[str, Any]:
    """What `run` would do with `processes` processes, as plain values; writes nothing.

    Raises:
        BigmergeError: `run` would refuse.
    """
    check_free(settings.out, overwrite=settings.overwrite)
    group = Group(cpu=settings.processes.cpu)
    try:
        described = _describe(settings, group, processes)
        group.settle()
        return described
    finally:
        group.close()


def _describe(settings: FisherSettings, group: Group, processes: int) -> dict[str, Any]:
    prepared = prepare(settings, group)
    measured = measure(prepared, prepared.rows.ids)
    lengths = measured.lengths
    check_scorable(len(lengths), settings)
    check_columns_count(prepared, measured)
    examples = Examples(prepared.rows, prepared.task, group.device)
    engine, reason = _choose(settings, prepared, examples, lengths, sum(lengths.values()) / len(lengths))
    limits = _limits(prepared, engine)
    elements = sum(parameter.numel() for parameter in prepared.model.parameters())
    return {
        **_summary(settings, prepared, group, processes, engine, reason),
        "dry_run": True,
        "examples": len(lengths),
        "skipped": len(prepared.rows.ids) - len(lengths),
        "tokens": measured.positions,
        "batches": len(make_batches(lengths, limits)),
        "parameters": elements,
        "bytes_per_process": _model_bytes(prepared.model) + 4 * elements + settings.memory,
        "output_bytes": elements * _itemsize(settings),
    }


class _Run:
    """The steps of `run`, with what they share."""

    def __init__(
        self, settings: FisherSettings, group: Group, held: contextlib.ExitStack, parent: int | None
    ) -> None:
        self.settings = settings
        self.group = group
        self.held = held
        self.started = time.monotonic()
        self.parent = parent

    def result(self) -> dict[str, Any]:
        settings, group = self.settings, self.group
        group.from_main(lambda: check_free(settings.out, overwrite=settings.overwrite))
        prepared = prepare(settings, group)
        mine = prepared.rows.ids[group.rank :: group.world]
        measured = group.together(lambda: measure(prepared, mine))
        lengths = measured.lengths
        total = sum(group.gather(len(lengths)))
        skipped = len(prepared.rows.ids) - total
        check_scorable(total, settings)
        group.together(lambda: check_columns_count(prepared, measured))
        if skipped:
            logger.info("%d of %d rows have nothing to score and are left out", skipped, total + skipped)

        examples = Examples(prepared.rows, prepared.task, group.device)
        typical = sum(group.gather(sum(lengths.values()))) / total
        name, reason = group.from_main(lambda: _choose(settings, prepared, examples, lengths, typical))
        logger.info("per-example engine: %s (%s)", name, reason)
        fingerprint = group.from_main(prepared.rows.fingerprint)
        staging, scratch = self._stage(prepared, name, fingerprint)
        group.together(lambda: self._self_check(prepared, name, examples, lengths))
        engine = group.together(lambda: self._engine(prepared, name))
        self.held.callback(engine.close)
        progress, resumed = self._estimate(prepared, engine, examples, lengths, scratch, total)
        engine.close()

        tokens = sum(group.gather(progress.tokens))
        sums = engine.sums
        for value in sums.values():
            group.sum_to_main(value)
        facts = {
            "format": 1,
            "kind": "diagonal",
            "model_fingerprint": prepared.subject.checkpoint.fingerprint(),
            "model_name": prepared.subject.short_name,
            "task": prepared.task.name,
            "labels": prepared.labels.name,
            "draws": prepared.labels.draws,
            "unit": prepared.task.unit,
            "convention": f"per {prepared.task.unit}, mean over examples",
            "examples": total,
            "tokens": tokens,
            "skipped": skipped,
            "dataset": {
                "name": settings.data.short_name,
                "split": settings.data.split,
                "columns": list(prepared.columns),
                "fingerprint": fingerprint,
            },
            "max_length": prepared.max_length,
            "seed": settings.data.seed,
            "engine": name,
            "model_dtype": str(next(prepared.model.parameters()).dtype).removeprefix("torch."),
            "dtype": settings.dtype,
            "bigmerge_version": __version__,
        }

        def write() -> dict[str, Any]:
            assert staging is not None
            values = mean_values(sums, total, prepared.names, getattr(torch, settings.dtype))
            recorded = write_fisher(staging.output, values, facts, settings.shard_bytes)
            staging.publish()
            return recorded

        recorded = group.from_main(lambda: write() if staging else None)
        if not group.is_main:
            return {}
        assert recorded is not None
        seconds = time.monotonic() - self.started
        return {
            **_summary(settings, prepared, group, group.world, name, reason),
            "dry_run": False,
            "examples": total,
            "resumed_examples": resumed,
            "skipped": skipped,
            "tokens": tokens,
            "parameters": recorded["elements"],
            "seconds": round(seconds, 3),
            "fisher": recorded,
        }

    def _stage(self, prepared: Prepared, engine: str, fingerprint: str) -> tuple[Staging | None, Path]:
        """Take the staging directory on the main process; all get the path of the scratch directory."""
        settings, group = self.settings, self.group
        kept: list[Staging] = []

        def stage() -> Path:
            description = prepared.run_description(settings, engine, fingerprint)
            staging = Staging(settings.out, description, overwrite=settings.overwrite)
            kept.append(self.held.enter_context(staging))
            return staging.scratch.absolute()

        scratch = group.from_main(stage)

        def reachable() -> None:
            if not scratch.is_dir():
                raise OutputError(
                    f"{scratch}: is not visible to process {group.rank}",
                    hint="processes on several machines need the output on a file system that they share",
                )

        group.together(reachable)
        return (kept[0] if kept else None), scratch

    def _engine(self, prepared: Prepared, name: str) -> Engine:
        with device_memory("the model's sums"):
            return ENGINES.get(name)(
                prepared.model, prepared.labels, prepared.task.score, memory=self.settings.memory
            )

    def _self_check(
        self, prepared: Prepared, engine: str, examples: Examples, lengths: dict[int, int]
    ) -> None:
        shortest = _shortest(lengths, 2)
        if shortest and self.group.is_main:
            with device_memory("two examples beside the model and its sums"):
                self_check(
                    ENGINES.get(engine),
                    prepared.model,
                    prepared.labels,
                    prepared.task.score,
                    examples.batch(shortest),
                    memory=self.settings.memory,
                )

    def _estimate(
        self,
        prepared: Prepared,
        engine: Engine,
        examples: Examples,
        lengths: dict[int, int],
        scratch: Path,
        total: int,
    ) -> tuple[Progress, int]:
        """Add this process's share to the engine's sums; also how many examples earlier runs had done."""
        settings, group = self.settings, self.group
        every = group.from_main(lambda: self._save_interval(engine, scratch))
        limits = _limits(prepared, engine.name)
        division = {
            "batch_examples": limits.examples,
            "batch_tokens": limits.tokens,
            "memory": settings.memory,
        }
        state = SavedState(scratch / "state", group, division, engine.sums, every)
        carried, progress = state.take_up()
        if carried:
            # Rows keep their place: what remains of all rows is divided anew among the processes there are now.
            remaining = [row for row in prepared.rows.ids.tolist() if row not in carried]
            mine = np.asarray(remaining, dtype=np.int64)[group.rank :: group.world]
            lengths = group.together(lambda: measure(prepared, mine)).lengths
        resumed = len(carried) + sum(group.gather(len(progress.finished)))
        if resumed:
            logger.info("going on after %d of %d examples", resumed, total)
        notices = Notices(scratch / "notices", group)
        group.from_main(notices.clear)
        bar = _WholeBar(
            total, resumed, len(lengths) - len(progress.finished), settings.progress and group.is_main
        )
        with StopRequest(parent=self.parent) as stop, contextlib.closing(bar):
            add_examples(
                engine,
                examples,
                make_batches(lengths, limits),
                progress,
                state=state,
                notices=notices,
                stop=stop,
                bar=bar,
            )
            bar.complete()
        return progress, resumed

    def _save_interval(self, engine: Engine, scratch: Path) -> float | None:
        """Seconds between saves; None where the disk has no room for saved sums.

        Raises:
            ResourceError: it has no room for the result either.
        """
        elements = sum(value.numel() for value in engine.sums.values())
        output = elements * _itemsize(self.settings)
        free = shutil.disk_usage(scratch).free + _size_of(scratch)
        if output > free:
            raise ResourceError(
                f"the Fisher takes {format_bytes(output)}, but {scratch.parent} has {format_bytes(free)} free",
                needed=output,
                free=free,
            )
        # Each process writes its new sums before it drops the old ones.
        if output + 2 * self.group.world * 4 * elements > free:
            logger.warning("the disk has no room for saved sums: an interrupted run will have to start again")
            return None
        return self.settings.save_every


class _WholeBar:
    """A progress bar over the examples of all processes, advanced by those of the main one."""

    def __init__(self, total: int, done: int, mine: int, show: bool) -> None:
        self._bar = progress_bar(total=total, unit="ex", desc="fisher", done=done, show=show)
        self._scale = (total - done) / mine if mine else 0.0
        self._done = float(done)

    def update(self, examples: int) -> None:
        self._done += examples * self._scale
        self._bar.update(int(self._done) - self._bar.n)

    def complete(self) -> None:
        self._bar.update((self._bar.total or 0) - self._bar.n)

    def close(self) -> None:
        self._bar.close()


def _choose(
    settings: FisherSettings,
    prepared: Prepared,
    examples: Examples,
    lengths: Mapping[int, int],
    typical_length: float,
) -> tuple[str, str]:
    limits = prepared.limits
    return choose_engine(
        settings.per_example,
        prepared.model,
        typical_length,
        min(limits.examples, max(1, int(limits.tokens / typical_length))),
        prepared.task.score,
        examples.batch(_shortest(lengths, 1)) if lengths else None,
    )


def _limits(prepared: Prepared, engine: str) -> BatchLimits:
    # An engine that takes examples one by one gains nothing from a batch, whose padding it would compute.
    return BatchLimits(1, 1 << 62) if engine == "loop" else prepared.limits


def _shortest(lengths: Mapping[int, int], count: int) -> list[int]:
    return sorted(lengths, key=lambda row: (lengths[row], row))[:count]


def _summary(
    settings: FisherSettings, prepared: Prepared, group: Group, processes: int, engine: str, reason: str
) -> dict[str, Any]:
    return {
        "output": str(settings.out),
        "model": settings.model,
        "task": prepared.task.name,
        "dataset": settings.data.dataset,
        "columns": list(prepared.columns),
        "labels": prepared.labels.name,
        "draws": prepared.labels.draws,
        "engine": engine,
        "engine_reason": reason,
        "max_length": prepared.max_length,
        "processes": processes,
        "device": "cpu" if group.device.type == "cpu" else str(group.device),
    }


def _itemsize(settings: FisherSettings) -> int:
    dtype = getattr(torch, settings.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype.itemsize


def _model_bytes(model: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _size_of(directory: Path) -> int:
    """Bytes that an earlier run's files take, which this run will replace."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
