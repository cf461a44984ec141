"""The rows an estimate is made from: opening a data set, choosing rows, identifying what was read."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from bigmerge.errors import BigmergeError, DatasetError
from bigmerge.fisher.settings import DataSettings

logger = logging.getLogger("bigmerge.fisher")

#: file name ending → builder of `datasets` and its arguments
_FILES: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
    ".text": ("text", {}),
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


class Rows:
    """The rows of one data set that an estimate uses.

    Attributes:
        columns: names of all columns of the data set.
        ids: int64 numbers of the chosen rows, in the order in which they were chosen.
        total: how many rows the data set has.
    """

    def __init__(self, dataset: Any, ids: np.ndarray) -> None:
        self._dataset = dataset
        self.columns: tuple[str, ...] = tuple(dataset.column_names)
        self.ids = ids
        self.total = len(dataset)

    def keep(self, columns: Sequence[str]) -> None:
        """Read only `columns` from here on."""
        self._dataset = self._dataset.select_columns(list(columns))

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        try:
            value: Mapping[str, Any] = self._dataset[int(row)]
        except Exception as error:  # a decoder of whatever format the data is in
            raise DatasetError(
                f"row {row} of the data set cannot be read ({_first_line(error)})", row=int(row)
            ) from error
        return value

    def fingerprint(self) -> str:
        """Identifies the chosen rows by number and content, as `xxh3:` and 32 hexadecimal digits."""
        digest = xxhash.xxh3_128()
        for row in self.ids.tolist():
            text = json.dumps([row, self[row]], sort_keys=True, ensure_ascii=False, default=repr)
            digest.update(text.encode("utf-8", "surrogatepass"))
        return "xxh3:" + digest.hexdigest()


def open_rows(settings: DataSettings) -> Rows:
    """Open the data set and choose its rows.

    Raises:
        DatasetError: it cannot be found or read, has no such split, or is empty.
    """
    dataset = _open(settings)
    if len(dataset) == 0:
        raise _no_rows(settings)
    return Rows(dataset, choose(len(dataset), settings))


def choose(total: int, settings: DataSettings) -> np.ndarray:
    """Numbers of the chosen rows of a data set of `total` rows, int64.

    The permutation sorts one word per row of the Philox counter-based generator keyed by the seed: its raw
    stream is fixed by its definition, so the choice is the same with every version of NumPy.
    """
    count = min(settings.num_examples, total)
    if not settings.shuffle:
        return np.arange(count, dtype=np.int64)
    words = np.random.Philox(key=settings.seed).random_raw(total)
    return np.argsort(words, kind="stable")[:count].astype(np.int64)


def _open(settings: DataSettings) -> Any:
    import datasets

    path = Path(settings.dataset).expanduser()
    with _quiet(datasets), _readable(settings):
        if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
            saved = datasets.load_from_disk(str(path))
            return saved if not isinstance(saved, dict) else _split(saved, settings)
        if path.is_file():
            builder, arguments = _builder(path)
            # One file is one split, whatever it is called.
            name = re.split(r"[\[+]", settings.split)[0] or "train"
            return datasets.load_dataset(
                builder, data_files={name: str(path)}, split=settings.split, **arguments
            )
        if not path.is_dir() and _looks_local(settings.dataset):
            raise DatasetError(f"{settings.dataset}: no such file or directory", dataset=settings.dataset)
        return datasets.load_dataset(settings.dataset, settings.subset, split=settings.split)


def _builder(path: Path) -> tuple[str, dict[str, Any]]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    if not suffixes or suffixes[-1] not in _FILES:
        raise DatasetError(
            f"{path}: is no data file of a known kind",
            hint=f"known are {', '.join(_FILES)} (also compressed), and directories written by save_to_disk",
            dataset=str(path),
        )
    return _FILES[suffixes[-1]]


def _no_rows(settings: DataSettings) -> DatasetError:
    return DatasetError(
        f"{settings.dataset}: split {settings.split!r} has no rows",
        dataset=settings.dataset,
        split=settings.split,
    )


def _split(saved: Mapping[str, Any], settings: DataSettings) -> Any:
    if settings.split not in saved:
        raise DatasetError(
            f"{settings.dataset}: has no split {settings.split!r}",
            hint=f"its splits are: {', '.join(saved)}",
            dataset=settings.dataset,
            split=settings.split,
            splits=list(saved),
        )
    return saved[settings.split]


def _looks_local(name: str) -> bool:
    """Whether a name that does not exist was meant as a path rather than as a name on the hub."""
    suffixes = Path(name).suffixes
    return (
        name.startswith((".", "/", "~"))
        or name.count("/") > 1
        or any(suffix.lower() in _FILES for suffix in suffixes)
    )


@contextmanager
def _readable(settings: DataSettings) -> Iterator[None]:
    """Turns whatever `datasets` and its readers raise into one error with one line."""
    try:
        yield
    except BigmergeError:
        raise
    except Exception as error:
        if "corresponds to no data" in str(error):
            raise _no_rows(settings) from error
        # The reader's own error is the cause of the one that says only that building failed.
        cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" else None
        raise DatasetError(
            f"{settings.dataset}: cannot be read as a data set ({_first_line(cause or error)})",
            hint=None
            if Path(settings.dataset).expanduser().exists()
            else "without a network, give a local file or a directory written by save_to_disk",
            dataset=settings.dataset,
            split=settings.split,
        ) from error


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Without the progress bars of `datasets`, which would mix with ours."""
    was_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    level = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.utils.logging.set_verbosity(level)
        if not was_disabled:
            datasets.enable_progress_bars()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
