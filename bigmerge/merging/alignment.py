"""Which tensors of several models belong together, and what becomes of those that do not.

Everything here is known from headers, except that integer tensors are compared and suspected ties are looked
at. All problems are gathered and reported together.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from bigmerge.checkpoints.checkpoint import Checkpoint, TensorSpec
from bigmerge.checkpoints.dtypes import FLOATS, INTEGERS
from bigmerge.checkpoints.fisher_facts import fisher_facts
from bigmerge.errors import AlignmentError, CheckpointError, UsageError
from bigmerge.merging.comparison import same_content, tied_names
from bigmerge.merging.heads import head_tensors, same_labels
from bigmerge.merging.sources import Source

_MOST_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Merged:
    """A tensor that all models share.

    Attributes:
        name: in the target, and in the output.
        models: the tensor in each model, in the order of the sources.
        companions: companion kind ("fisher") → the tensor in each model's companion.
        base: the same tensor in the base model; None without one.
    """

    name: str
    models: tuple[TensorSpec, ...]
    companions: Mapping[str, tuple[TensorSpec, ...]]
    base: TensorSpec | None

    @property
    def inputs(self) -> list[TensorSpec]:
        """Everything that is read for it, in a fixed order: models, companions, base."""
        specs = list(self.models)
        for kind in sorted(self.companions):
            specs += self.companions[kind]
        if self.base is not None:
            specs.append(self.base)
        return specs

    @property
    def compute_dtype(self) -> str:
        """The dtype of the arithmetic: float64 where any model stores float64, else float32."""
        return "F64" if any(spec.dtype == "F64" for spec in self.models) else "F32"


@dataclass(frozen=True, slots=True)
class Kept:
    """A tensor that is taken from the target as it is, and why."""

    name: str
    spec: TensorSpec
    reason: str

    @property
    def inputs(self) -> list[TensorSpec]:
        """What is read for it."""
        return [self.spec]


@dataclass(frozen=True)
class Alignment:
    """What becomes of every tensor.

    Attributes:
        merged, kept: together the tensors of the output.
        dropped: tensor name → what was left out (tied copies, tensors only donors have) and why.
        warnings: what the user should know, one line each.
    """

    merged: tuple[Merged, ...]
    kept: tuple[Kept, ...]
    dropped: Mapping[str, str]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Selection:
    """Which tensors to merge: glob patterns on the target's tensor names.

    Attributes:
        include: only names that match one of these are merged; empty: all.
        exclude: names that match one of these are not merged.
        strict: a tensor that could not be merged is an error, unless a pattern left it out.
        merge_heads: merge task heads of equal shape even where the label names do not show that the models
            have the same task.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    strict: bool = False
    merge_heads: bool = False

    def left_out(self, name: str) -> str | None:
        """Why the patterns leave `name` out; None if they do not."""
        for pattern in self.exclude:
            if fnmatch.fnmatchcase(name, pattern):
                return f"excluded by {pattern!r}"
        if self.include and not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.include):
            return "matches no --include pattern"
        return None


def align(
    sources: Sequence[Source],
    *,
    target: int,
    companions: Sequence[str],
    base: Checkpoint | None,
    selection: Selection,
) -> Alignment:
    """Match the sources' tensors by name.

    Args:
        target: position of the model that unmergeable tensors come from.
        companions: what the method needs beside each model; "fisher" is the one known.

    Raises:
        AlignmentError: something that cannot be resolved; lists everything at once.
        UsageError: a pattern matches no tensor.
        CheckpointError: a model is quantised.
    """
    for checkpoint in (*(source.checkpoint for source in sources), *([base] if base else [])):
        _refuse_quantised(checkpoint)
    target_names = sources[target].checkpoint.tensors
    _check_patterns(selection, target_names)
    warnings: list[str] = []
    models = [_named_like(target_names, source.checkpoint, source.label, warnings) for source in sources]
    fishers: list[Mapping[str, TensorSpec]] = []
    if "fisher" in companions:
        lacking = [source.label for source in sources if source.fisher is None]
        if lacking:
            raise AlignmentError(
                f"Fisher merging needs a Fisher for every model; there is none for: {', '.join(lacking)}",
                hint="measure it with `bigmerge fisher MODEL --dataset ...`, or use --method linear",
                models=lacking,
            )
        for source in sources:
            assert source.fisher is not None
            fishers.append(_named_like(target_names, source.fisher, f"{source.label}'s Fisher", warnings))
    bases = _named_like(target_names, base, "the base", warnings) if base is not None else None
    _check_stale_fishers(sources, fishers, selection, warnings)

    heads: Set[str] = frozenset()
    if not (selection.merge_heads or same_labels([source.checkpoint for source in sources])):
        heads = head_tensors(sources[target].checkpoint)
    dropped: dict[str, str] = {}
    for copy, kept_name in tied_names(sources[target].checkpoint).items():
        dropped[copy] = f"tied to {kept_name}"
    merged: list[Merged] = []
    kept: list[Kept] = []
    problems: list[str] = []
    for name, spec in target_names.items():
        if name in dropped:
            continue
        specs = [model.get(name) for model in models]
        present = [found for found in specs if found is not None]
        reason = selection.left_out(name)
        if reason is None and name in heads:
            reason, _ = _obstacle(name, spec, specs, (), sources, strict=False)
            reason = reason or "task head (--merge-heads merges it)"
            if selection.strict:
                problems.append(f"{name}: {reason}")
                continue
        if reason is None:
            reason, problem = _obstacle(name, spec, specs, fishers, sources, strict=selection.strict)
            if problem:
                problems.append(problem)
                continue
        base_spec = bases.get(name) if bases is not None else None
        if reason is None and bases is not None:
            reason = _base_obstacle(spec, base_spec)
            if reason is not None and selection.strict:
                problems.append(f"{name}: {reason}")
                continue
        if reason is None:
            owned = {"fisher": tuple(fisher[name] for fisher in fishers)} if fishers else {}
            merged.append(Merged(name, tuple(present), owned, base_spec))
        else:
            kept.append(Kept(name, spec, reason))
    for name, owners in _only_donors_have(sources, models, target_names).items():
        dropped[name] = f"not in the target, only in {', '.join(owners)}"
        if selection.strict:
            problems.append(f"{name}: {dropped[name]}")
    if problems:
        shown = problems[:_MOST_SHOWN]
        more = len(problems) - len(shown)
        raise AlignmentError(
            f"{len(problems)} tensors do not fit together:\n    "
            + "\n    ".join(shown)
            + (f"\n    … and {more} more (--json lists all)" if more else ""),
            hint="--exclude PATTERN takes a tensor from the target instead",
            problems=problems,
        )
    if not merged:
        reasons = sorted({entry.reason for entry in kept})
        raise AlignmentError(
            f"nothing is left to merge: of {len(kept)} tensors, " + "; ".join(reasons[:4])
            if kept
            else "nothing is left to merge: the target holds no tensors",
            hint="are these fine-tuned from the same model? `bigmerge inspect` shows a checkpoint's tensors",
            reasons=reasons,
        )
    return Alignment(tuple(merged), tuple(kept), dropped, tuple(warnings))


def _base_obstacle(spec: TensorSpec, base: TensorSpec | None) -> str | None:
    if base is None:
        return "missing in the base"
    if base.shape != spec.shape:
        return f"shape {list(spec.shape)} differs in the base {list(base.shape)}"
    if base.dtype not in FLOATS:
        return f"dtype {base.dtype} of the base cannot be averaged"
    return None


def _only_donors_have(
    sources: Sequence[Source], models: Sequence[Mapping[str, TensorSpec]], target: Mapping[str, TensorSpec]
) -> dict[str, list[str]]:
    """Tensor name → labels of the models that have it although the target does not."""
    owners: dict[str, list[str]] = {}
    for source, model in zip(sources, models, strict=True):
        for name in model:
            if name not in target:
                owners.setdefault(name, []).append(source.label)
    return owners


def _obstacle(
    name: str,
    spec: TensorSpec,
    specs: Sequence[TensorSpec | None],
    fishers: Sequence[Mapping[str, TensorSpec]],
    sources: Sequence[Source],
    *,
    strict: bool,
) -> tuple[str | None, str | None]:
    """(why the tensor is kept from the target, or a problem that has to be an error)."""
    reason: str | None = None
    missing = [source.label for source, found in zip(sources, specs, strict=True) if found is None]
    others = [found for found in specs if found is not None]
    reshaped = [
        f"{source.label} {list(found.shape)}"
        for source, found in zip(sources, specs, strict=True)
        if found is not None and found.shape != spec.shape
    ]
    if missing:
        reason = f"missing in {', '.join(missing)}"
    elif reshaped:
        reason = f"shape {list(spec.shape)} differs in {', '.join(reshaped)}"
    elif all(found.dtype in INTEGERS for found in others):
        for source, found in zip(sources, specs, strict=True):
            if found is not None and not same_content(spec, found):
                return None, f"{name}: integer tensor differs between the target and {source.label}"
        return f"integers ({spec.dtype}), the same in every model", None
    elif not all(found.dtype in FLOATS for found in others):
        kinds = sorted({found.dtype for found in others})
        reason = f"dtype {', '.join(kinds)} cannot be averaged"
    elif fishers:
        having = [fisher.get(name) for fisher in fishers]
        if all(found is None for found in having):
            reason = "no Fisher in any model"
        for source, found in zip(sources, having, strict=True):
            if found is None and reason is None:
                return None, f"{name}: missing in {source.label}'s Fisher, but not in every Fisher"
            if found is not None and found.shape != spec.shape:
                return None, (
                    f"{name}: {source.label}'s Fisher has shape {list(found.shape)}, the tensor {list(spec.shape)}"
                )
            if found is not None and found.dtype not in FLOATS:
                return None, f"{name}: {source.label}'s Fisher has dtype {found.dtype}"
    if reason is not None and strict:
        return None, f"{name}: {reason}"
    return reason, None


def _named_like(
    target: Mapping[str, TensorSpec], checkpoint: Checkpoint, label: str, warnings: list[str]
) -> Mapping[str, TensorSpec]:
    """The checkpoint's tensors under the target's names.

    A bare encoder and the same encoder under a task head differ by a prefix (`encoder.…`, `bert.encoder.…`). If
    adding or removing one leading component brings most names together, that is what is done.
    """
    own = checkpoint.tensors
    best, best_hits = own, sum(name in target for name in own)
    if 2 * best_hits >= min(len(own), len(target)):
        return own
    renamings: list[tuple[str, dict[str, TensorSpec]]] = []
    for prefix in sorted({name.split(".", 1)[0] for name in target if "." in name}):
        renamings.append((f"with {prefix!r} before each name", {f"{prefix}.{n}": s for n, s in own.items()}))
    for prefix in sorted({name.split(".", 1)[0] for name in own if "." in name}):
        stripped = {n.removeprefix(f"{prefix}."): s for n, s in own.items()}
        if len(stripped) == len(own):
            renamings.append((f"without {prefix!r} before its names", stripped))
    for how, renamed in renamings:
        hits = sum(name in target for name in renamed)
        if hits > 2 * best_hits and 2 * hits > min(len(own), len(target)):
            best, best_hits, chosen = renamed, hits, how
    if best is not own:
        warnings.append(f"{label}: read {chosen}, to match the target's names")
    return best


def _check_patterns(selection: Selection, names: Mapping[str, Any]) -> None:
    for option, patterns in (("--include", selection.include), ("--exclude", selection.exclude)):
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                raise UsageError(
                    f"{option} {pattern!r} matches no tensor of the target",
                    hint="patterns are globs on whole names, such as '*.classifier.*'",
                    pattern=pattern,
                )


def _refuse_quantised(checkpoint: Checkpoint) -> None:
    settings = (checkpoint.config or {}).get("quantization_config")
    if settings:
        kind = settings.get("quant_method", "unknown") if isinstance(settings, dict) else settings
        raise CheckpointError(
            f"{checkpoint.root}: is quantised ({kind}); its numbers cannot be averaged as they are",
            hint="merge the unquantised checkpoints and quantise the result",
            file=str(checkpoint.root),
        )


def _check_stale_fishers(
    sources: Sequence[Source],
    fishers: Sequence[Mapping[str, TensorSpec]],
    selection: Selection,
    warnings: list[str],
) -> None:
    if not fishers:
        return
    facts = [fisher_facts(source.fisher) for source in sources if source.fisher is not None]
    for source, fact in zip(sources, facts, strict=True):
        recorded = fact.get("model_fingerprint")
        if recorded and recorded != source.checkpoint.fingerprint():
            message = f"{source.label}'s Fisher was measured on other weights than the model has"
            if selection.strict:
                raise AlignmentError(message, hint="measure it again with `bigmerge fisher`")
            warnings.append(message)
    for key in ("kind", "labels", "unit", "convention"):
        values = {str(fact[key]) for fact in facts if key in fact}
        if len(values) > 1:
            warnings.append(
                f"the Fishers differ in {key} ({', '.join(sorted(values))}); their scales are comparable only "
                "after normalisation"
            )
