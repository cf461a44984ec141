"""The demo's table, picture and JSON, from scores alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

Right = Sequence[bool]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: Key in the JSON.
        title: What people read.
        right: Task name → whether each held-out text was answered right, in the split's order.
        seconds: Wall time that it took to make; None where nothing was made.
    """

    name: str
    title: str
    right: Mapping[str, Right]
    seconds: float | None = None

    def accuracy(self, task: str) -> float:
        """Fraction of the task's texts answered right."""
        return sum(self.right[task]) / len(self.right[task])

    def mean(self) -> float:
        """Mean of the tasks' accuracies, each task counting the same."""
        return sum(map(self.accuracy, self.right)) / len(self.right)


@dataclasses.dataclass(frozen=True)
class Results:
    """Everything that is reported.

    Attributes:
        tasks: Task names in the table's order.
        majority: Task name → accuracy of always giving the most frequent answer.
        parents: Every parent on its own task.
        others: Each parent alone on all tasks, with the tasks' own heads.
        merged: The merged models, the plain average first.
        part: Which split was scored.
    """

    tasks: tuple[str, ...]
    majority: Mapping[str, float]
    parents: Row
    others: tuple[Row, ...]
    merged: tuple[Row, ...]
    part: str = "test"

    def rows(self) -> tuple[Row, ...]:
        """All rows in the table's order."""
        return (self.parents, *self.others, *self.merged)

    def kept(self, row: Row) -> float:
        """The row's mean accuracy as a fraction of the parents'."""
        return row.mean() / self.parents.mean()


def difference(first: Row, second: Row) -> tuple[float, float]:
    """Mean accuracy of `first` minus that of `second`, and its standard error from pairing the texts.

    The error says how much other test texts of the same kind could move the difference, not how much other
    fine-tuning runs could.
    """
    total = variance = 0.0
    for task, ours in first.right.items():
        deltas = [int(a) - int(b) for a, b in zip(ours, second.right[task], strict=True)]
        count = len(deltas)
        mean = sum(deltas) / count
        total += mean
        variance += sum((delta - mean) ** 2 for delta in deltas) / (count - 1) / count
    tasks = len(first.right)
    return total / tasks, math.sqrt(variance) / tasks


def table(results: Results) -> str:
    """The results as aligned text, accuracies in percent."""
    counts = {task: len(results.parents.right[task]) for task in results.tasks}
    header = ["", *results.tasks, "mean", "kept", "seconds"]
    lines = [[f"{results.part} texts", *(str(counts[task]) for task in results.tasks), "", "", ""]]
    chance = [results.majority[task] for task in results.tasks]
    lines.append(
        ["always the commonest answer", *map(_percent, (*chance, sum(chance) / len(chance))), "", ""]
    )
    for row in results.rows():
        cells = [_percent(row.accuracy(task)) for task in results.tasks]
        seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
        lines.append([row.title, *cells, _percent(row.mean()), f"{_percent(results.kept(row))} %", seconds])
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]

    def aligned(line: Sequence[str]) -> str:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
    body = [aligned(line) for line in lines]
    first_merged = len(body) - len(results.merged)
    return "\n".join(
        [aligned(header), rule, *body[:2], rule, *body[2:first_merged], rule, *body[first_merged:], rule]
    )


def comparison(results: Results, pairs: Sequence[tuple[str, str]]) -> str:
    """One line per pair of merged models, given by name: how far the first is from the second."""
    rows = {row.name: row for row in results.merged}
    named = [(rows[first], rows[second]) for first, second in pairs]
    labels = [f"{first.title} − {second.title}:" for first, second in named]
    lines = []
    for label, (first, second) in zip(labels, named, strict=True):
        gain, error = difference(first, second)
        lines.append(
            f"{label.ljust(max(map(len, labels)))} {100 * gain:+.1f} ± {100 * error:.1f} points of the mean"
        )
    return "\n".join(lines)


def as_json(results: Results) -> dict[str, Any]:
    """The results as plain data, accuracies as fractions."""
    average = results.merged[0]
    rows = {}
    for row in results.rows():
        gain, error = difference(row, average)
        rows[row.name] = {
            "title": row.title,
            "accuracy": {task: row.accuracy(task) for task in results.tasks},
            "mean": row.mean(),
            "kept": results.kept(row),
            "minus_average": {"mean": gain, "standard_error": error},
            "seconds": row.seconds,
        }
    return {
        "split": results.part,
        "texts": {task: len(results.parents.right[task]) for task in results.tasks},
        "majority": dict(results.majority),
        "rows": rows,
    }


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"
