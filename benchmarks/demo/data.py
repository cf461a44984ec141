"""Duplicate-free, disjoint and reproducible splits of a corpus, written as JSON lines for `bigmerge fisher`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.demo import corpora
from benchmarks.demo.corpora import Example
from benchmarks.demo.files import write_atomically
from benchmarks.demo.settings import Task
from bigmerge.errors import DatasetError

_KEY_WORDS = 40  # texts that agree in so many first words are the same text to models that read little more


@dataclasses.dataclass(frozen=True)
class Splits:
    """Disjoint parts of one corpus; no two examples in them have the same `text_key`."""

    test: tuple[Example, ...]
    validation: tuple[Example, ...]
    train: tuple[Example, ...]


def text_key(text: str) -> str:
    """What makes two texts duplicates: the first words, without case, punctuation and spacing."""
    return " ".join(re.findall(r"\w+", text.casefold())[:_KEY_WORDS])


def unique(examples: Iterable[Example]) -> list[Example]:
    """The first of each group of duplicates; groups whose members disagree on the label are left out."""
    first: dict[str, Example] = {}
    disputed: set[str] = set()
    for text, label in examples:
        key = text_key(text)
        if first.setdefault(key, (text, label))[1] != label:
            disputed.add(key)
    return [example for key, example in first.items() if key not in disputed]


def split(examples: Iterable[Example], task: Task, seed: int = 0) -> Splits:
    """Divide `examples` as `task` says, in an order that depends on the texts and `seed` alone.

    Sorting by a hash instead of shuffling makes the splits independent of the files' order and of Python's
    random generator.

    Raises:
        DatasetError: fewer distinct texts than the splits need.
    """

    def place(example: Example) -> bytes:
        return hashlib.sha256(f"{seed}\n{text_key(example[0])}".encode()).digest()

    rows = sorted(unique(examples), key=place)
    wanted = task.test + task.validation + task.train
    if len(rows) < wanted:
        raise DatasetError(
            f"{task.name} has {len(rows)} distinct texts, its splits need {wanted}",
            hint="ask for smaller splits in benchmarks/demo/settings.py",
            found=len(rows),
            wanted=wanted,
        )
    middle = task.test + task.validation
    return Splits(
        test=tuple(rows[: task.test]),
        validation=tuple(rows[task.test : middle]),
        train=tuple(rows[middle:wanted]),
    )


def load(task: Task) -> Splits:
    """Read the task's corpus and split it."""
    return split(corpora.READERS[task.name](task), task)


def write_jsonl(path: Path, examples: Sequence[Example]) -> None:
    """Write one object with `text` and `label` (class index) per line; an existing file is replaced."""
    lines = (json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in examples)
    write_atomically(path, "".join(f"{line}\n" for line in lines))


def majority(examples: Sequence[Example]) -> float:
    """Accuracy of always answering the most frequent label of `examples`."""
    labels = [label for _, label in examples]
    return max(map(labels.count, set(labels))) / len(labels)
