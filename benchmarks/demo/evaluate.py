"""How often a body answers right on a task's held-out texts, with that task's own head."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from benchmarks.demo import models
from benchmarks.demo.settings import Task
from bigmerge.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Job:
    """Score the body in `body` on the JSON lines `texts` with the head of the parent in `head`."""

    row: str
    task: Task
    body: Path
    head: Path
    texts: Path


def load_whole(directory: Path) -> PreTrainedModel:
    """The classification model in `directory`.

    Raises:
        CheckpointError: the stored weights are not exactly those of the architecture.
    """
    model, info = AutoModelForSequenceClassification.from_pretrained(directory, output_loading_info=True)
    problems = {kind: sorted(map(str, found)) for kind, found in info.items() if found}
    if problems:
        raise CheckpointError(f"{directory} does not load cleanly: {problems}", problems=problems)
    return model


def with_body_of(model: PreTrainedModel, other: PreTrainedModel) -> PreTrainedModel:
    """`model` with the body of `other` and its own head."""
    setattr(model, model.base_model_prefix, other.base_model)
    return model


def score(job: Job) -> list[bool]:
    """Whether the answer to each text of `job.texts` is right, in the file's order. Uses one thread."""
    torch.set_num_threads(1)
    models.quiet()
    model = load_whole(job.head)
    if job.body != job.head:
        model = with_body_of(model, load_whole(job.body))
    with job.texts.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    examples = [(row["text"], row["label"]) for row in rows]
    data = models.encode(models.load_tokenizer(), examples, job.task.max_length)
    return [bool(right) for right in models.correct(model, data)]
