"""Opening data sets of every kind, choosing rows, fingerprints, and errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_checkpoints import rows, save_csv

from bigmerge.errors import DatasetError
from bigmerge.fisher.data import choose, open_rows
from bigmerge.fisher.settings import DataSettings

ROWS = rows(7)


@pytest.fixture(autouse=True)
def _caches(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def _write(directory: Path, kind: str) -> Path:
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    path = directory / f"data.{kind}"
    if kind == "csv":
        return save_csv(path, ROWS)
    if kind == "tsv":
        path.write_text("text\tlabel\n" + "".join(f"{row['text']}\t{row['label']}\n" for row in ROWS))
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif kind == "parquet":
        data.to_parquet(path)
    elif kind == "saved":
        data.save_to_disk(path)
    elif kind == "dict":
        datasets.DatasetDict({"train": data}).save_to_disk(path)
    elif kind == "folder":
        path.mkdir()
        save_csv(path / "train.csv", ROWS)
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet", "saved", "dict", "folder"])
def test_every_kind_gives_the_same_rows(tmp_path, kind):
    opened = open_rows(DataSettings(str(_write(tmp_path, kind)), shuffle=False))
    assert set(opened.columns) == {"text", "label"}
    opened.keep(["label", "text"])
    assert [dict(opened[row]) for row in opened.ids] == ROWS


def test_text_file(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("one line\nanother\n")
    opened = open_rows(DataSettings(str(path), shuffle=False))
    assert [opened[row]["text"] for row in opened.ids] == ["one line", "another"]


def test_a_file_is_the_split_that_was_asked_for_and_slices_work(tmp_path):
    path = _write(tmp_path, "csv")
    opened = open_rows(DataSettings(str(path), split="validation[2:4]", shuffle=False))
    assert [opened[row]["text"] for row in opened.ids] == [row["text"] for row in ROWS[2:4]]


def test_choice_is_a_permutation_keyed_by_the_seed_that_never_changes():
    settings = DataSettings("x", num_examples=100, seed=0)
    assert sorted(choose(100, settings)) == list(range(100))
    # Known values: the choice of rows is part of what a seed means, in every later version too.
    assert choose(1000, DataSettings("x", num_examples=5, seed=0)).tolist() == KNOWN[0]
    assert choose(1000, DataSettings("x", num_examples=5, seed=7)).tolist() == KNOWN[7]
    few = choose(1000, DataSettings("x", num_examples=3, seed=7)).tolist()
    assert few == KNOWN[7][:3]


def test_without_shuffling_the_first_rows_are_taken():
    assert choose(10, DataSettings("x", num_examples=4, shuffle=False)).tolist() == [0, 1, 2, 3]
    assert choose(3, DataSettings("x", num_examples=4, shuffle=False)).tolist() == [0, 1, 2]


def test_a_permutation_of_many_rows_is_fair():
    first = [choose(5, DataSettings("x", num_examples=1, seed=seed))[0] for seed in range(500)]
    counts = np.bincount(first, minlength=5)
    assert counts.min() > 60  # expected 100, standard deviation 9
    assert counts.max() < 140


def test_fingerprint_says_what_was_read(tmp_path):
    path = _write(tmp_path, "csv")
    base = open_rows(DataSettings(str(path), num_examples=4))
    assert base.fingerprint() == open_rows(DataSettings(str(path), num_examples=4)).fingerprint()
    assert base.fingerprint() != open_rows(DataSettings(str(path), num_examples=3)).fingerprint()
    assert base.fingerprint() != open_rows(DataSettings(str(path), num_examples=4, seed=1)).fingerprint()
    changed = [{**row, "text": row["text"] + " cat"} for row in ROWS]
    other = open_rows(DataSettings(str(save_csv(tmp_path / "other.csv", changed)), num_examples=4))
    assert base.fingerprint() != other.fingerprint()
    same = open_rows(DataSettings(str(_write(tmp_path, "parquet")), num_examples=4))
    assert base.fingerprint() == same.fingerprint()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.csv", None, "no such file or directory"),
        ("./missing", None, "no such file or directory"),
        ("data.doc", "x", "no data file of a known kind"),
        ("empty.csv", "text,label\n", "no rows"),
        ("broken.json", "{", "cannot be read as a data set"),
        ("broken.parquet", "no parquet", "cannot be read as a data set"),
    ],
)
def test_unusable_data_is_one_clear_error(tmp_path, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_text(content)
    with pytest.raises(DatasetError, match=message) as caught:
        open_rows(DataSettings(name))
    assert name.removeprefix("./") in caught.value.message
    assert "\n" not in caught.value.message


def test_missing_split_lists_those_there_are(tmp_path):
    path = _write(tmp_path, "dict")
    with pytest.raises(DatasetError, match="no split 'test'") as caught:
        open_rows(DataSettings(str(path), split="test"))
    assert caught.value.data["splits"] == ["train"]
    with pytest.raises(DatasetError, match="test"):
        open_rows(DataSettings(str(_write(tmp_path, "folder")), split="test"))


KNOWN = {0: [998, 162, 670, 664, 185], 7: [887, 535, 753, 631, 201]}
