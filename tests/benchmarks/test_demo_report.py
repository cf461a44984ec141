from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy
import pytest

from benchmarks.demo import picture, report
from benchmarks.demo.report import Results, Row


def answers(count: int, right: int, seed: int = 0) -> list[bool]:
    found = [True] * right + [False] * (count - right)
    random.Random(seed).shuffle(found)
    return found


@pytest.fixture
def results() -> Results:
    a, b = answers(10, 9), answers(20, 16)
    return Results(
        tasks=("a", "b"),
        majority={"a": 0.5, "b": 0.25},
        parents=Row("parents", "parents, own task", {"a": a, "b": b}, 123.4),
        others=(Row("a", "parent a on all tasks", {"a": a, "b": answers(20, 5)}, 60.0),),
        merged=(
            Row("average", "plain average", {"a": answers(10, 7), "b": answers(20, 10)}, 1.0),
            Row("fisher", "Fisher", {"a": answers(10, 8), "b": answers(20, 14)}, 22.0),
        ),
    )


def test_every_task_counts_the_same_in_the_mean(results: Results) -> None:
    assert results.parents.mean() == pytest.approx((0.9 + 0.8) / 2)
    assert results.kept(results.merged[0]) == pytest.approx(0.6 / 0.85)


def test_difference_against_numpy() -> None:
    rng = random.Random(3)
    first = Row(
        "x", "x", {"a": [rng.random() < 0.8 for _ in range(50)], "b": [rng.random() < 0.6 for _ in range(30)]}
    )
    second = Row(
        "y", "y", {"a": [rng.random() < 0.7 for _ in range(50)], "b": [rng.random() < 0.5 for _ in range(30)]}
    )
    gain, error = report.difference(first, second)
    deltas = [
        numpy.array(first.right[task], float) - numpy.array(second.right[task], float) for task in ("a", "b")
    ]
    assert gain == pytest.approx(first.mean() - second.mean())
    assert error == pytest.approx(math.sqrt(sum(d.var(ddof=1) / len(d) for d in deltas)) / 2)


def test_table_is_aligned_and_holds_the_numbers(results: Results) -> None:
    lines = report.table(results).splitlines()
    rows = {line[:28].strip(): line.split() for line in lines}
    assert rows["parents, own task"][-6:] == ["90.0", "80.0", "85.0", "100.0", "%", "123.4"]
    assert rows["plain average"][-6:] == ["70.0", "50.0", "60.0", "70.6", "%", "1.0"]
    assert rows["always the commonest answer"][-3:] == ["50.0", "25.0", "37.5"]
    assert rows["test texts"][-2:] == ["10", "20"]
    assert len(lines[0]) == len(lines[1]) == len(lines[-1])
    end = lines[0].index(" b ") + 2
    cells = [line[:end].split()[-1] for line in lines if line[0] != "─"]
    assert cells == ["b", "20", "25.0", "80.0", "25.0", "50.0", "70.0"]


def test_comparison_names_both_models(results: Results) -> None:
    gain, error = report.difference(results.merged[1], results.merged[0])
    assert gain == pytest.approx(0.15)
    lines = report.comparison(results, [("fisher", "average"), ("fisher", "fisher")]).splitlines()
    assert lines == [
        f"Fisher − plain average: +15.0 ± {100 * error:.1f} points of the mean",
        "Fisher − Fisher:        +0.0 ± 0.0 points of the mean",
    ]


def test_json_holds_what_the_table_shows(results: Results) -> None:
    record = json.loads(json.dumps(report.as_json(results)))
    assert set(record["rows"]) == {"parents", "a", "average", "fisher"}
    assert record["rows"]["fisher"]["accuracy"] == {"a": 0.8, "b": 0.7}
    assert record["rows"]["average"]["minus_average"] == {"mean": 0, "standard_error": 0}
    assert record["texts"] == {"a": 10, "b": 20}


def test_picture_shows_every_panel_and_value(results: Results, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib import image

    picture.draw(results, tmp_path / "results.png")
    pixels = image.imread(tmp_path / "results.png")
    assert pixels.shape[1] > 2 * pixels.shape[0] > 400
    assert pixels[..., :3].std() > 0.05
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.png"]
