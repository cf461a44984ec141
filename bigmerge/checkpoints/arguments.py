"""From names on the command line to open checkpoints: directories, files that belong together, hub names."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from bigmerge.checkpoints.checkpoint import (
    NOT_WEIGHTS,
    WEIGHT_SUFFIXES,
    Checkpoint,
    check_complete,
    list_directory,
    open_checkpoint,
    open_files,
    read_json_object,
    shard_family,
)
from bigmerge.checkpoints.fisher_facts import is_fisher
from bigmerge.checkpoints.hub import download, is_hub_name
from bigmerge.errors import CheckpointError, UsageError

log = logging.getLogger("bigmerge.merge")

_INDEX_SUFFIX = ".index.json"


@dataclass(frozen=True)
class Named:
    """A checkpoint and what it is called.

    Attributes:
        label: the directory's or family's name, or the name on the hub.
        hub_name: its name on the hub, if it came from there.
    """

    label: str
    checkpoint: Checkpoint
    hub_name: str | None = None


def locate(name: str | Path) -> Path:
    """The path that `name` is, or the local copy of the model of that name on the hub.

    Raises:
        CheckpointError: it is neither.
    """
    path, text = Path(name), str(name)
    if _exists(path):
        return path
    hint = None
    beside = path.parent
    if is_hub_name(text):
        # A directory of the first part's name shows that a path was meant, unless a revision is given.
        if "@" in text or not beside.is_dir():
            return download(text)
        hint = f"{beside} is a directory here, so the hub was not asked; {text}@main would ask it"
    if any(letter in text for letter in "*?["):
        hint = "the pattern matches nothing"
    elif beside.is_dir():
        near = difflib.get_close_matches(path.name, [entry.name for entry in list_directory(beside)], n=1)
        hint = f"did you mean {beside / near[0]}?" if near else hint
    raise CheckpointError(f"{name}: no such file or directory", hint=hint, file=text)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # longer than names can be
        return False


def resolve(name: str | Path) -> Checkpoint:
    """Open one path or hub name.

    Raises:
        CheckpointError: it is neither, or malformed.
    """
    return open_checkpoint(locate(name))


def resolve_model(name: str | Path) -> Named:
    """Open the one model that `name` is: a directory, file, index or hub name.

    Raises:
        CheckpointError: it is neither, malformed, or not all of a model.
        UsageError: it is a Fisher.
    """
    units, _ = open_arguments([name])
    source = units[0] if units else Named(_stem(Path(name).name), resolve(name))
    if is_fisher(source.checkpoint):
        raise UsageError(f"{name} is a Fisher, where a model is wanted")
    return source


def open_arguments(arguments: Sequence[str | Path]) -> tuple[list[Named], list[Path]]:
    """Each checkpoint (model or Fisher) among the arguments, in their order, and what is none.

    Raises:
        CheckpointError: an argument does not exist, is malformed, or not all of a model.
    """
    skipped: list[Path] = []
    indexes = _Indexes()
    families: dict[Path, list[Path]] = {}  # grows while the arguments are looked at, before anything opens
    opening: list[Callable[[], Named]] = []
    for argument in arguments:
        path = Path(argument)
        if not _exists(path):
            opening.append(partial(_open_elsewhere, argument))
        elif path.is_dir():
            if has_weights(path):
                opening.append(partial(_open_directory, path))
            else:
                skipped.append(path)
                log.warning("%s: skipped, it holds no weights", path)
        elif _is_index(path) or (path.name.endswith(WEIGHT_SUFFIXES) and not NOT_WEIGHTS.match(path.name)):
            family = shard_family(path)
            named_like = path.parent / (family[0] if family else path.name)
            key = path if _is_index(path) else indexes.of(path) or named_like
            if key not in families:
                families[key] = []
                opening.append(partial(_open_family, key, families[key]))
            families[key].append(path)
        else:
            skipped.append(path)
    return [open_one() for open_one in opening], skipped


def _is_index(path: Path) -> bool:
    return path.name.endswith(tuple(suffix + _INDEX_SUFFIX for suffix in WEIGHT_SUFFIXES))


def _open_elsewhere(name: str | Path) -> Named:
    return Named(str(name), resolve(name), hub_name=str(name))


def _open_directory(directory: Path) -> Named:
    return Named(_directory_label(directory), open_checkpoint(directory))


class _Indexes:
    """The index files beside weight files, each read once."""

    def __init__(self) -> None:
        self._named: dict[Path, dict[str, Path]] = {}

    def of(self, path: Path) -> Path | None:
        """The index that lists the file `path`."""
        if path.parent not in self._named:
            named = self._named[path.parent] = {}
            for index in sorted(path.parent.glob("*" + _INDEX_SUFFIX)):
                try:
                    weight_map = read_json_object(index).get("weight_map")
                except CheckpointError:  # it matters only to those who name it
                    continue
                for file in weight_map.values() if isinstance(weight_map, dict) else ():
                    named.setdefault(str(file), index)
        return self._named[path.parent].get(path.name)


def _directory_label(directory: Path) -> str:
    # Not resolved: a link is called what the user calls it.
    whole = Path(os.path.abspath(directory))
    return f"{whole.parent.name}-fisher" if whole.name in {"fisher", "fishers"} else whole.name


def _stem(filename: str) -> str:
    return Path(filename.removesuffix(_INDEX_SUFFIX)).stem


def has_weights(directory: Path) -> bool:
    """Whether there are files in it that look like weights."""
    return any(
        entry.name.endswith((*WEIGHT_SUFFIXES, _INDEX_SUFFIX)) and not NOT_WEIGHTS.match(entry.name)
        for entry in list_directory(directory)
    )


def _open_family(key: Path, given: list[Path]) -> Named:
    """The model made of the files `given`, all of which belong to the index or the family name `key`."""
    given = sorted(set(given))
    parent, label = key.parent, _stem(key.name)
    if key.name.endswith(_INDEX_SUFFIX):
        checkpoint = replace(open_checkpoint(key), root=key)
        lacking = sorted({file.name for file in checkpoint.files} - {file.name for file in given})
        if lacking and key not in given:
            raise CheckpointError(
                f"{given[0]}: is one of {len(checkpoint.files)} files of {key}, but {', '.join(lacking[:8])} "
                f"{'is' if len(lacking) == 1 else 'are'} not among the arguments",
                hint="name all of them, the index, or their directory",
                file=str(given[0]),
                missing=lacking,
            )
    else:
        check_complete(given)
        checkpoint = open_files(given[0], given)
    # The weights of a whole model directory, given file by file: config and tokenizer belong to them.
    if (parent / "config.json").is_file():
        try:
            whole = open_checkpoint(parent)
        except CheckpointError:  # several models side by side, say
            whole = None
        if whole is not None and set(whole.files) == set(checkpoint.files):
            return Named(_directory_label(parent), whole)
    return Named(label, checkpoint)
