"""The demo: real model, real texts, real commands. Run `make demo`, or `python -m benchmarks.demo`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.demo import commands, data, files, picture, report, workers
from benchmarks.demo.commands import Layout
from benchmarks.demo.settings import TASKS, Merging, Task, Training
from bigmerge.errors import BigmergeError

_PAIRS = (("fisher", "average"), ("fisher-scaled", "average-scaled"), ("fisher-scaled", "average"))


def say(text: str) -> None:
    """Progress, on standard error: standard output is for the table."""
    print(text, file=sys.stderr, flush=True)


class Steps:
    """Announces the demo's steps and keeps their wall times in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, title: str) -> Iterator[None]:
        say(f"\n── {title}")
        started = time.perf_counter()
        yield
        self.seconds[title] = time.perf_counter() - started
        say(f"── {title}: {self.seconds[title]:.1f} s")


def prepare_data(layout: Layout, tasks: Sequence[Task]) -> dict[str, data.Splits]:
    """Split every corpus and write the splits as JSON lines."""
    splits = {}
    for task in tasks:
        parts = splits[task.name] = data.load(task)
        for part in ("train", "validation", "test"):
            data.write_jsonl(layout.texts(task, part), getattr(parts, part))
        say(
            f"  {task.name}: {task.title}; {len(parts.train)} texts to train on, {len(parts.test)} to test on"
        )
    return splits


def fine_tune(
    layout: Layout, tasks: Sequence[Task], training: Training, splits: dict[str, data.Splits]
) -> dict[str, dict[str, Any]]:
    """Bring every parent up to date; task name → the record of its fine-tuning."""
    from benchmarks.demo import finetune

    records: dict[str, dict[str, Any]] = {}
    missing = []
    for task in tasks:
        train = splits[task.name].train
        record = finetune.reusable(layout.parent(task), finetune.key(task, training, train))
        if record is None:
            missing.append((layout.parent(task), task, training, train))
        else:
            records[task.name] = record
            say(f"  {task.name}: reused from an earlier run, which took {record['seconds']:.0f} s for it")
    base = finetune.base_key(tasks[0], training)
    if finetune.reusable(layout.base, base) is None:
        finetune.prepare_base(layout.base, tasks[0], training)
    # longest first, so that no core idles at the end
    missing.sort(key=lambda job: -job[1].epochs * job[1].train * job[1].max_length)
    for _, record in workers.each(finetune.fine_tune, missing):
        records[record["task"]] = record
        say(
            f"  {record['task']}: done in {record['seconds']:.0f} s, loss {record['last_loss']:.3f} at the end"
        )
    return records


def evaluate(layout: Layout, tasks: Sequence[Task], merging: Merging, part: str) -> dict[str, dict[str, Any]]:
    """Score every parent and every merged model on every task; row name → task name → right or not."""
    from benchmarks.demo.evaluate import Job, score

    bodies = {task.name: layout.parent(task) for task in tasks}
    bodies |= {variant.name: layout.merged(variant) for variant in commands.variants(merging)}
    jobs = [
        Job(row, task, body, layout.parent(task), layout.texts(task, part))
        for row, body in bodies.items()
        for task in tasks
    ]
    scores: dict[str, dict[str, Any]] = {row: {} for row in bodies}
    for index, right in workers.each(score, [(job,) for job in jobs]):
        scores[jobs[index].row][jobs[index].task.name] = right
    return {row: {task.name: found[task.name] for task in tasks} for row, found in scores.items()}


def gather(
    tasks: Sequence[Task],
    merging: Merging,
    scores: dict[str, dict[str, Any]],
    majority: dict[str, float],
    seconds: dict[str, float],
    part: str,
) -> report.Results:
    """Put scores and times (row name → seconds; `parents` for all of them) into the table's rows."""
    return report.Results(
        tasks=tuple(task.name for task in tasks),
        majority=majority,
        parents=report.Row(
            "parents",
            "parents, each on its own task",
            {task.name: scores[task.name][task.name] for task in tasks},
            seconds["parents"],
        ),
        others=tuple(
            report.Row(
                task.name, f"parent {task.name} on all tasks", scores[task.name], seconds.get(task.name)
            )
            for task in tasks
        ),
        merged=tuple(
            report.Row(variant.name, variant.title, scores[variant.name], seconds[variant.name])
            for variant in commands.variants(merging)
        ),
        part=part,
    )


def run(layout: Layout, tasks: Sequence[Task], training: Training, merging: Merging, part: str) -> None:
    """All steps; prints the table and writes results.json and results.png."""
    step = Steps()
    started = time.perf_counter()
    with step("texts"):
        splits = prepare_data(layout, tasks)
    with step("fine-tuning one parent per task from the same pre-trained model"):
        records = fine_tune(layout, tasks, training, splits)
    with step("measuring Fishers"):
        fishers = commands.measure_fishers(layout, tasks, merging)
    with step("merging"):
        merges = commands.merge_all(layout, merging)
    with step(f"scoring on {part} texts"):
        scores = evaluate(layout, tasks, merging, part)

    measuring = sum(done.seconds for done in fishers)
    seconds = {task.name: records[task.name]["seconds"] for task in tasks}
    seconds["parents"] = sum(seconds.values())
    for variant in commands.variants(merging):
        seconds[variant.name] = merges[variant.name].seconds + (measuring if variant.fisher else 0.0)
    majority = {task.name: data.majority(getattr(splits[task.name], part)) for task in tasks}
    results = gather(tasks, merging, scores, majority, seconds, part)

    record = report.as_json(results)
    record["commands"] = [
        {"command": done.command, "seconds": done.seconds} for done in (*fishers, *merges.values())
    ]
    record["step_seconds"] = step.seconds
    record["fine_tuning"] = records
    record["scale"] = {"value": merging.scale, "origin": Merging.__doc__}
    record["machine"] = {"cores": workers.cores(), "python": platform.python_version()}
    record["versions"] = {name: version(name) for name in ("bigmerge", "torch", "transformers", "accelerate")}
    files.write_atomically(
        layout.root / "results.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    )
    picture.draw(results, layout.root / "results.png")
    say(f"\n── all of it: {time.perf_counter() - started:.0f} s\n")
    print(explained(results, layout, merging, measuring))


def explained(results: report.Results, layout: Layout, merging: Merging, measuring: float) -> str:
    """The table and what a reader needs to trust it."""
    return f"""\
Accuracy on held-out {results.part} texts, %; every task with its own head, only the body is merged.

{report.table(results)}

{report.comparison(results, _PAIRS)}
(± is the paired standard error over the {results.part} texts; other fine-tuning runs would differ by more.)

kept: mean accuracy relative to the parents'. seconds: fine-tuning (sum over tasks; one thread each) for the
parents; for merged models the merge, and with Fishers also {measuring:.1f} s for measuring them once.
Scale {merging.scale:g} was fixed before this demo: the best of 1.3, 1.6 and 2.0 in an earlier experiment with other
splits and one more task (some of today's test texts may have been among those scored then). Nothing is tuned
on the texts that are scored here. All weights but the pooler's were fine-tuned; with trained poolers the default
Fisher merge lost to the plain average on validation texts (79.9 to 83.5), --fisher-normalize tensor did not (85.8).

Models: {layout.root}/merged   Numbers: {layout.root}/results.json   Picture: {layout.root}/results.png"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(".demo"), help="where its files go (default .demo)")
    parser.add_argument(
        "--evaluate-on",
        choices=("test", "validation"),
        default="test",
        help="validation: for whoever changes the settings, so that the test texts stay unseen",
    )
    given = parser.parse_args(arguments)
    # everything is in installed packages: no request may slow the demo down or change it
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    try:
        run(Layout(given.root), TASKS, Training(), Merging(), given.evaluate_on)
    except BigmergeError as error:
        say(f"demo: error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        say("demo: interrupted; run it again: parents that were finished are kept")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
