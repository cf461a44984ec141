"""From the command line's arguments to models, each with its weight and its Fisher.

A directory with weights is one model. Files that share an index or a `name-00001-of-0000N` pattern are one
model, and so is an index alone; any other weight file is one model; other files are skipped. A source whose
header says that it is a Fisher belongs to the model with the fingerprint recorded in it, else to the one that
its name points to (`a` and `a-fisher`, `a.fisher.safetensors` or `a/fisher`).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bigmerge.checkpoints.arguments import Named, has_weights, open_arguments, resolve, resolve_model
from bigmerge.checkpoints.checkpoint import Checkpoint, open_checkpoint
from bigmerge.checkpoints.fisher_facts import fisher_facts, is_fisher
from bigmerge.errors import AlignmentError, UsageError

_FISHER_NAME = re.compile(r"(?P<model>.+)[-_.]fishers?(?P<suffix>\.\w+)?$")


@dataclass(frozen=True)
class Source:
    """One model of a merge.

    Attributes:
        label: how it is called in messages and results; unique within a merge.
        weight: λ.
        fisher: its Fisher, if it has one.
        hub_name: its name on the hub, if it came from there.
    """

    label: str
    checkpoint: Checkpoint
    weight: float = 1.0
    fisher: Checkpoint | None = None
    hub_name: str | None = None


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


def group(arguments: Sequence[str | Path]) -> Grouping:
    """Group positional arguments into models and pair Fishers with them.

    Raises:
        CheckpointError: an argument does not exist or is malformed.
        AlignmentError: a Fisher has no model, or a model two Fishers.
    """
    units, skipped = open_arguments(arguments)
    fishers = [unit for unit in units if _looks_like_fisher(unit)]
    models = [unit for unit in units if not _looks_like_fisher(unit)]
    sources = _unique_labels([_source(unit) for unit in models])
    for unit in fishers:
        fisher = unit.checkpoint
        owner = _owner(unit.label, fisher, sources)
        other = sources[owner].fisher
        if other is not None:
            raise AlignmentError(
                f"model {sources[owner].label!r} has two Fishers: {other.root} and {fisher.root}",
                hint="name the one you mean: --model M --fisher F",
            )
        sources[owner] = replace(sources[owner], fisher=fisher)
    # A Fisher inside its model's directory need not be named.
    for position, source in enumerate(sources):
        inside = source.checkpoint.root / "fisher"
        if (
            source.fisher is None
            and source.checkpoint.root.is_dir()
            and inside.is_dir()
            and has_weights(inside)
        ):
            fisher = open_checkpoint(inside)
            _check_measured_on(source, fisher)
            sources[position] = replace(source, fisher=fisher)
    return Grouping(tuple(sources), tuple(skipped))


def _source(unit: Named) -> Source:
    return Source(unit.label, unit.checkpoint, hub_name=unit.hub_name)


def _looks_like_fisher(unit: Named) -> bool:
    return is_fisher(unit.checkpoint) or _FISHER_NAME.fullmatch(unit.label) is not None


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
            _check_measured_on(sources[candidates[0]], fisher)
            return candidates[0]
    raise AlignmentError(
        f"Fisher {fisher.root} belongs to none of the models "
        f"{', '.join(repr(s.label) for s in sources) or '(none)'}",
        hint="name it after its model (`a` and `a-fisher`), or say --model M --fisher F",
        fisher=str(fisher.root),
    )


def _check_measured_on(source: Source, fisher: Checkpoint) -> None:
    recorded = fisher_facts(fisher).get("model_fingerprint")
    if recorded and source.checkpoint.fingerprint() != recorded:
        raise AlignmentError(
            f"Fisher {fisher.root} was measured on other weights than {source.label!r} has",
            hint="measure it again with `bigmerge fisher`; if it does belong to this model, say so: "
            "--model M --fisher F",
            fisher=str(fisher.root),
            model=source.label,
        )


def _unique_labels(sources: Sequence[Source]) -> list[Source]:
    """Lengthen labels that occur twice by their parent directories."""
    labels = [source.label for source in sources]
    used: set[str] = set()
    result: list[Source] = []
    for source in sources:
        label = source.label
        if labels.count(label) > 1:
            label = f"{Path(os.path.abspath(source.checkpoint.root)).parent.name}/{label}"
        while label in used:
            label += "'"
        used.add(label)
        result.append(replace(source, label=label))
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
    if isinstance(arguments, (str, Path)):
        raise UsageError(
            "the sources are a list of paths, not one path", hint=f"write [{str(arguments)!r}, …]"
        )
    grouped = group(arguments)
    if fishers and len(fishers) != len(models):
        raise UsageError(
            f"{len(fishers)} --fisher for {len(models)} --model",
            hint="give each --model its own --fisher, in the same order, or none at all",
        )
    named = [
        replace(
            _source(resolve_model(name)),
            fisher=resolve(fishers[position]) if fishers else None,
        )
        for position, name in enumerate(models)
    ]
    sources = _unique_labels([*grouped.sources, *named])
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
    if not all(math.isfinite(weight) for weight in weights):
        raise UsageError(f"a --weight is no finite number: {', '.join(f'{w:g}' for w in weights)}")
    if weights:
        sources = [
            replace(source, weight=float(weight)) for source, weight in zip(sources, weights, strict=True)
        ]
    return replace(grouped, sources=tuple(sources))
