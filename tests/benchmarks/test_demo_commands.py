from __future__ import annotations

import operator
import sys
from pathlib import Path

import pytest

from benchmarks.demo import __main__ as demo
from benchmarks.demo import commands, workers
from benchmarks.demo.commands import Layout
from benchmarks.demo.settings import TASKS, Merging
from bigmerge.errors import BigmergeError

LAYOUT = Layout(Path(".demo"))


@pytest.fixture(autouse=True)
def plain_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "_program", lambda: "bigmerge")


def test_the_fisher_command() -> None:
    assert commands.fisher_command(LAYOUT, TASKS[0], Merging(fisher_examples=10)) == (
        "bigmerge fisher .demo/shards/rt --dataset .demo/data/rt-train.jsonl --num-examples 10 --max-length 40"
        " --num-processes 2 --cpu -o .demo/shards/rt-fisher"
    )


def test_the_merge_commands() -> None:
    merging = Merging(scale=1.6)
    found = [commands.merge_command(LAYOUT, variant, merging) for variant in commands.variants(merging)]
    scale = "--base .demo/base/minilm --scale 1.6"
    assert found == [
        "bigmerge merge .demo/shards/* --method linear -o .demo/merged/average",
        "bigmerge merge .demo/shards/* -o .demo/merged/fisher",
        f"bigmerge merge .demo/shards/* --method linear {scale} -o .demo/merged/average-scaled",
        f"bigmerge merge .demo/shards/* {scale} -o .demo/merged/fisher-scaled",
    ]


def test_paths_are_quoted_for_the_shell(tmp_path: Path) -> None:
    command = commands.merge_command(
        Layout(tmp_path / "my models"), commands.variants(Merging())[1], Merging()
    )
    assert f"'{tmp_path}/my models/shards'/*" in command


def test_run_echoes_and_keeps_standard_output_free(capfd: pytest.CaptureFixture[str]) -> None:
    done = commands.run("echo result; echo progress >&2")
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.split("\n") == ["", "$ echo result; echo progress >&2", "result", "progress", ""]
    assert done.seconds > 0


def test_a_failing_command_stops_the_demo() -> None:
    with pytest.raises(BigmergeError, match="exit code 3"):
        commands.run("exit 3")


def test_only_parents_are_beside_the_fishers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(tmp_path)
    for name in ("rt", "rt-fisher", "rt-fisher.partial", "task-of-last-week"):
        (layout.shards / name).mkdir(parents=True)
    seen = []

    def run(command: str) -> commands.Done:
        seen.append(sorted(path.name for path in layout.shards.iterdir()))
        return commands.Done(command, 1.0)

    monkeypatch.setattr(commands, "run", run)
    assert len(commands.measure_fishers(layout, TASKS[:1], Merging())) == 1
    assert seen == [["rt"]]


def test_jobs_come_back_with_their_index() -> None:
    found = dict(workers.each(operator.mul, [(2, 3), ("a", 2), (0, 9)]))
    assert found == {0: 6, 1: "aa", 2: 0}
    assert list(workers.each(operator.mul, [])) == []


def test_a_failing_job_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        list(workers.each(operator.truediv, [(1, 0)]))


def test_rows_take_the_parents_answers_from_their_own_tasks() -> None:
    tasks, merging = TASKS[:2], Merging()
    names = [task.name for task in tasks] + [variant.name for variant in commands.variants(merging)]
    scores = {row: {task.name: [row == task.name, True] for task in tasks} for row in names}
    seconds = {name: float(place) for place, name in enumerate([*names, "parents"])}
    results = demo.gather(tasks, merging, scores, {"rt": 0.5, "tweets": 0.5}, seconds, "test")
    assert results.parents.right == {"rt": [True, True], "tweets": [True, True]}
    assert [row.accuracy("tweets") for row in results.others] == [0.5, 1.0]
    assert [row.name for row in results.merged] == [variant.name for variant in commands.variants(merging)]
    assert [row.seconds for row in results.merged] == [2.0, 3.0, 4.0, 5.0]
    assert "1.6" in demo.explained(results, LAYOUT, merging, 10.0)


def test_errors_end_the_demo_with_their_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> None:
        raise BigmergeError("no such thing", hint="do this")

    monkeypatch.setattr(demo, "run", fail)
    assert demo.main(["--root", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no such thing" in captured.err
    assert "do this" in captured.err


def test_the_program_is_that_of_this_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert Path(commands._program().split()[0]).absolute().parent == Path(sys.executable).parent
