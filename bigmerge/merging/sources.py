"""From the command line's arguments to models, each with its weight and its Fisher.

A directory with weights is one model. Files that share an index or a `name-00001-of-0000N` pattern are one
model; any other weight file is one model; other files are skipped. A source whose header says that it is a
Fisher belongs to the model with the fingerprint recorded in it, else to the one that its name points to
(`a` and `a-fisher`, `a.fisher.safetensors` or `a/fisher`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bigmerge.checkpoints.checkpoint import (
    NOT_WEIGHTS,
    WEIGHT_SUFFIXES,
    Checkpoint,
    check_complete,
    open_checkpoint,
    open_files,
    shard_family,
)
from bigmerge.checkpoints.hub import download, is_hub_name
from bigmerge.errors import AlignmentError, CheckpointError, UsageError
from bigmerge.merging.fisher_facts import FACTS_KEY, fisher_facts

_FISHER_NAME = re.compile(r"(?P<model>.+)[-_.]fishers?(?P<suffix>\.\w+)?$")


@dataclass(frozen=True)
class Source:
    """One model of a merge.

    Attributes:
        label: how it is called in messages and results; unique within a merge.
        weight: λ.
        fisher: its Fisher, if it has one.
        named_fisher: whether the user named the Fisher for this model (and answers for the pairing).
    """

    label: str
    checkpoint: Checkpoint
    weight: float = 1.0
    fisher: Checkpoint | None = None
    named_fisher: bool = False


@dataclass(frozen=True)
class Grouping:
    """What a list of arguments means.

    Attributes:
        sources: the models, in the order of the arguments.
        skipped: arguments that are no weights.
    """

    sources: tuple[Source, ...]
    skipped: tuple[Path, ...] = ()

    def describe(self) -> str:
        """One line for each model."""
        lines = [
            f"{source.label}: {len(source.checkpoint.files)} file(s)"
            + (f", Fisher {source.fisher.root}" if source.fisher else ", no Fisher")
            for source in self.sources
        ]
        lines += [f"{path}: skipped, no weights" for path in self.skipped]
        return "\n    ".join(lines) or "nothing"


def resolve(name: str | Path) -> Checkpoint:
    """Open one path or hub name.

    Raises:
        CheckpointError: it is neither, or malformed.
    """
    path = Path(name)
    if not path.exists() and is_hub_name(str(name)):
        path = download(str(name))
    return open_checkpoint(path)


def is_fisher(checkpoint: Checkpoint) -> bool:
    """Whether the header says so."""
    return FACTS_KEY in checkpoint.metadata


def group(arguments: Sequence[str | Path]) -> Grouping:
    """Group positional arguments into models and pair Fishers with them.

    Raises:
        CheckpointError: an argument does not exist or is malformed.
        AlignmentError: a Fisher has no model, or a model two Fishers.
    """
    units: list[tuple[str, Checkpoint]] = []
    skipped: list[Path] = []
    families: dict[tuple[Path, str], list[Path]] = {}
    order: list[tuple[Path, str] | Path | str] = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            order.append(path)
        elif path.is_file():
            if path.name.endswith(WEIGHT_SUFFIXES) and not NOT_WEIGHTS.match(path.name):
                family = shard_family(path)
                key = (path.parent, family[0] if family else path.name)
                if key not in families:
                    families[key] = []
                    order.append(key)
                families[key].append(path)
            else:
                skipped.append(path)
        elif is_hub_name(str(argument)):
            order.append(str(argument))
        else:
            raise CheckpointError(f"{argument}: no such file or directory", file=str(argument))

    for unit in order:
        if isinstance(unit, str):
            units.append((unit, resolve(unit)))
        elif isinstance(unit, Path):
            if _has_weights(unit):
                units.append((_directory_label(unit), open_checkpoint(unit)))
            else:
                skipped.append(unit)
        else:
            units.append(_open_family(*unit, families[unit]))

    models = [(label, checkpoint) for label, checkpoint in units if not _looks_like_fisher(label, checkpoint)]
    fishers = [(label, checkpoint) for label, checkpoint in units if _looks_like_fisher(label, checkpoint)]
    # A Fisher inside its model's directory need not be named.
    for _, checkpoint in models:
        inside = checkpoint.root / "fisher"
        if checkpoint.root.is_dir() and inside.is_dir() and _has_weights(inside):
            fishers.append((f"{checkpoint.root.name}-fisher", open_checkpoint(inside)))
    sources = [Source(label, checkpoint) for label, checkpoint in _unique_labels(models)]
    for label, fisher in fishers:
        owner = _owner(label, fisher, sources)
        if sources[owner].fisher is not None:
            other = sources[owner].fisher
            assert other is not None
            raise AlignmentError(
                f"model {sources[owner].label!r} has two Fishers: {other.root} and {fisher.root}",
                hint="name the one you mean: --model M --fisher F",
            )
        sources[owner] = replace(sources[owner], fisher=fisher)
    return Grouping(tuple(sources), tuple(skipped))


def _directory_label(directory: Path) -> str:
    whole = directory.resolve()
    return f"{whole.parent.name}-fisher" if whole.name in {"fisher", "fishers"} else whole.name


def _has_weights(directory: Path) -> bool:
    return any(
        entry.name.endswith((*WEIGHT_SUFFIXES, ".index.json")) and not NOT_WEIGHTS.match(entry.name)
        for entry in directory.iterdir()
    )


def _open_family(parent: Path, name: str, files: list[Path]) -> tuple[str, Checkpoint]:
    files = sorted(set(files))
    check_complete(files)
    label = Path(name).stem
    # The weights of a whole model directory, given file by file: config and tokenizer belong to them.
    if (parent / "config.json").is_file():
        whole = open_checkpoint(parent)
        if set(whole.files) == set(files):
            return (parent.name or label, whole)
    return label, open_files(files[0] if len(files) == 1 else parent / label, files)


def _looks_like_fisher(label: str, checkpoint: Checkpoint) -> bool:
    return is_fisher(checkpoint) or _FISHER_NAME.fullmatch(label) is not None


def _owner(label: str, fisher: Checkpoint, sources: list[Source]) -> int:
    """Position of the model that a Fisher belongs to."""
    recorded = fisher_facts(fisher).get("model_fingerprint")
    if recorded:
        matching = [n for n, source in enumerate(sources) if source.checkpoint.fingerprint() == recorded]
        if len(matching) == 1:
            return matching[0]
        # The same weights twice: let the name decide between them.
    match = _FISHER_NAME.fullmatch(label)
    wanted = match["model"] if match else None
    named = [n for n, source in enumerate(sources) if source.label.rpartition("/")[2] == wanted]
    near = [n for n in named if sources[n].checkpoint.root.parent == fisher.root.parent]
    for candidates in (named, near):
        if len(candidates) == 1:
            position = candidates[0]
            if recorded and sources[position].checkpoint.fingerprint() != recorded:
                raise AlignmentError(
                    f"Fisher {fisher.root} was measured on other weights than {sources[position].label!r} has",
                    hint="measure it again with `bigmerge fisher`; if it does belong to this model, say so: "
                    "--model M --fisher F",
                    fisher=str(fisher.root),
                    model=sources[position].label,
                )
            return position
    raise AlignmentError(
        f"Fisher {fisher.root} belongs to none of the models "
        f"{', '.join(repr(s.label) for s in sources) or '(none)'}",
        hint="name it after its model (`a` and `a-fisher`), or say --model M --fisher F",
        fisher=str(fisher.root),
    )


def _unique_labels(units: list[tuple[str, Checkpoint]]) -> list[tuple[str, Checkpoint]]:
    """Lengthen labels that occur twice by their parent directories."""
    labels = [label for label, _ in units]
    result: list[tuple[str, Checkpoint]] = []
    for label, checkpoint in units:
        if labels.count(label) > 1:
            label = f"{checkpoint.root.absolute().parent.name}/{label}"
        while label in {used for used, _ in result}:
            label += "'"
        result.append((label, checkpoint))
    return result


def collect(
    arguments: Sequence[str | Path],
    models: Sequence[str | Path] = (),
    weights: Sequence[float] = (),
    fishers: Sequence[str | Path] = (),
) -> Grouping:
    """The sources of a merge: positional arguments first, then `models` with their `fishers`.

    Args:
        weights: λ for every model in that order, or none for equal weights.
        fishers: one for each of `models`, or none.

    Raises:
        UsageError: the numbers do not match; shows how the arguments were grouped.
        CheckpointError, AlignmentError: see `group`.
    """
    grouped = group(arguments)
    if fishers and len(fishers) != len(models):
        raise UsageError(
            f"{len(fishers)} --fisher for {len(models)} --model",
            hint="give each --model its own --fisher, in the same order, or none at all",
        )
    named = [
        Source(
            str(name).rstrip("/").rpartition("/")[2],
            resolve(name),
            fisher=resolve(fishers[position]) if fishers else None,
            named_fisher=bool(fishers),
        )
        for position, name in enumerate(models)
    ]
    labels = _unique_labels([(s.label, s.checkpoint) for s in (*grouped.sources, *named)])
    sources = [
        replace(source, label=label)
        for source, (label, _) in zip((*grouped.sources, *named), labels, strict=True)
    ]
    grouped = replace(grouped, sources=tuple(sources))
    if len(sources) < 2:
        raise UsageError(
            f"merging takes at least two models; the arguments were grouped as\n    {grouped.describe()}",
            hint="a directory is one model; for several models in it, name what it contains: DIRECTORY/*",
        )
    if weights and len(weights) != len(sources):
        raise UsageError(
            f"{len(weights)} --weight for {len(sources)} models:\n    {grouped.describe()}",
            hint="give one --weight for each model, in this order, or none",
        )
    if weights:
        sources = [
            replace(source, weight=float(weight)) for source, weight in zip(sources, weights, strict=True)
        ]
    return replace(grouped, sources=tuple(sources))
