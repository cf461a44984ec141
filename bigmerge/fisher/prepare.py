"""Everything that is decided and checked before the first example goes through the model."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from bigmerge import __version__
from bigmerge.errors import DatasetError, InputError, UsageError
from bigmerge.fisher.batching import BatchLimits, batch_limits
from bigmerge.fisher.data import Rows, open_rows
from bigmerge.fisher.labels.base import LABELS, LabelSource
from bigmerge.fisher.loading import Subject, input_length, load_model, open_subject
from bigmerge.fisher.names import CheckpointNames
from bigmerge.fisher.settings import FisherSettings
from bigmerge.fisher.tasks.base import Task, TaskSettings
from bigmerge.processes import Group

logger = logging.getLogger("bigmerge.fisher")

#: beyond this many backward passes per example, an exact expectation is surely not meant
_MOST_COLUMNS = 4096


@dataclass(frozen=True)
class Prepared:
    """A model, its task and its data, ready to be measured on this process's device.

    Attributes:
        columns: columns of the data set that are read.
        max_length: length that inputs are cut to.
    """

    subject: Subject
    model: Any
    task: Task
    labels: LabelSource
    limits: BatchLimits
    rows: Rows
    columns: tuple[str, ...]
    names: CheckpointNames
    max_length: int | None

    def run_description(self, settings: FisherSettings, engine: str, data_fingerprint: str) -> dict[str, Any]:
        """What an interrupted run must have in common with the one that takes it up."""
        return {
            "command": "fisher",
            "model": {
                "name": self.subject.short_name,
                "fingerprint": self.subject.checkpoint.fingerprint(),
            },
            "task": self.task.name,
            "labels": self.labels.name,
            "draws": self.labels.draws,
            "engine": engine,
            "dataset": {
                "name": settings.data.short_name,
                "subset": settings.data.subset,
                "split": settings.data.split,
                "columns": list(self.columns),
                "fingerprint": data_fingerprint,
            },
            "num_examples": settings.data.num_examples,
            "shuffle": settings.data.shuffle,
            "seed": settings.data.seed,
            "max_length": self.max_length,
            "dtype": settings.dtype,
            "shard_bytes": settings.shard_bytes,
            "bigmerge_version": __version__,
        }


def prepare(settings: FisherSettings, group: Group) -> Prepared:
    """Open and check everything. All processes call this together; an error on one is raised on all.

    Raises:
        InputError: the model or the data is not usable.
        UsageError: settings that do not fit the model.
        EstimationError: the self-check failed.
    """
    subject = group.main_first(lambda: open_subject(settings.model, settings.task))
    chosen = settings.labels
    if chosen == "auto":
        chosen = subject.task(TaskSettings(), subject.config, subject.tokenizer).default_labels()
    labels = LABELS.get(chosen)(seed=settings.data.seed, draws=settings.draws)
    rows = group.main_first(lambda: open_rows(settings.data))
    model = group.together(lambda: load_model(subject, group.device))

    def build() -> Prepared:
        max_length = input_length(model, subject.tokenizer, settings.max_length)
        task = subject.task(
            TaskSettings(settings.text_columns, settings.label_column, max_length, labels.needs_targets),
            model.config,
            subject.tokenizer,
        )
        task.check_model(model)
        columns = task.check_columns(rows.columns)
        rows.keep(columns)
        return Prepared(
            subject=subject,
            model=model,
            task=task,
            labels=labels,
            limits=batch_limits(
                model,
                task_scores_tokens=task.scores_tokens,
                batch_size=settings.batch_size,
                memory=settings.memory,
                device=group.device,
            ),
            rows=rows,
            columns=columns,
            names=CheckpointNames(model, subject.checkpoint),
            max_length=max_length,
        )

    return group.together(build)


@dataclass(frozen=True)
class Measured:
    """The chosen rows that have something to score.

    Attributes:
        lengths: tokens by id.
        positions: how many positions they score together.
        most: the most that one of them scores.
    """

    lengths: dict[int, int]
    positions: int
    most: int


def measure(prepared: Prepared, ids: np.ndarray) -> Measured:
    """Tokenize the rows `ids`, checking each.

    Raises:
        DatasetError: a row has no text or a label outside the head's range.
        InputError: the tokenizer makes tokens that the model does not have.
    """
    task = prepared.task
    known = int(prepared.model.get_input_embeddings().weight.shape[0])
    lengths: dict[int, int] = {}
    positions = most = 0
    for row in ids.tolist():
        encoded = task.encode(prepared.rows[row], row)
        scored = task.positions(encoded)
        if scored == 0:
            continue
        largest = max(encoded["input_ids"])
        if largest >= known:
            raise InputError(
                f"row {row}: the tokenizer makes token {largest}, but the model has {known} tokens",
                hint="the tokenizer belongs to another model",
                row=row,
                token=largest,
                vocabulary=known,
            )
        lengths[row] = len(encoded["input_ids"])
        positions += scored
        most = max(most, scored)
    return Measured(lengths, positions, most)


def check_scorable(examples: int, settings: FisherSettings) -> None:
    """Refuse data in which nothing can be scored.

    Raises:
        DatasetError: no example is left.
    """
    if examples == 0:
        raise DatasetError(
            f"{settings.data.dataset}: none of the chosen rows has anything to score",
            hint="the texts are empty or too short; choose another column with --text-column",
            dataset=settings.data.dataset,
        )


def check_columns_count(prepared: Prepared, measured: Measured) -> None:
    """Refuse label expectations that would take unreasonably many backward passes.

    Raises:
        UsageError: says how many.
    """
    task, config = prepared.task, prepared.model.config
    classes = config.get_text_config().vocab_size if task.scores_tokens else config.num_labels
    passes = prepared.labels.column_count(classes, measured.most)
    if passes > _MOST_COLUMNS:
        raise UsageError(
            f"{prepared.labels.name} labels would take {passes} backward passes for one example",
            hint="use --labels sampled: drawing labels from the model estimates the same",
            passes=passes,
        )
