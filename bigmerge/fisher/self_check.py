"""Compares an engine with plain autograd on a few examples, before hours are spent on it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from bigmerge.errors import EstimationError
from bigmerge.fisher.batch import Batch, Scores
from bigmerge.fisher.engines.base import Engine, Score
from bigmerge.fisher.engines.model_state import plainly_differentiable
from bigmerge.fisher.engines.reference import plain_gradients
from bigmerge.fisher.labels.base import LabelSource

logger = logging.getLogger("bigmerge.fisher")

#: Relative error allowed per tensor. Float32 models measure 1e-6 where nothing is wrong. In half precision
#: every activation is rounded, and differently in batches of one and of two: small models measure 0.015, which
#: grows with depth. Treating tokens as examples is wrong by 0.9, forgetting that weights are tied by 0.25.
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 0.2, torch.float16: 0.2}

#: gradients below this many rounding errors of the largest gradient are taken for noise
_NOISE = 4.0


@dataclass(frozen=True)
class SelfCheck:
    """What a passed self-check has seen.

    Attributes:
        worst_parameter: the parameter that differs most; None if nothing rose above the noise.
        worst_error: its ‖engine − plain‖, relative to the larger of both norms.
        tolerance: what would have been allowed.
        compared: how many parameters were compared.
        noise: parameters whose gradients are zero but for rounding, and were not.
    """

    worst_parameter: str | None
    worst_error: float
    tolerance: float
    compared: int
    noise: tuple[str, ...]


def self_check(
    engine_class: type[Engine],
    model: torch.nn.Module,
    labels: LabelSource,
    score: Score,
    batch: Batch,
    *,
    memory: int,
    tolerance: float | None = None,
) -> SelfCheck:
    """Add `batch` (two short examples) by an engine and by plain autograd, and compare every parameter.

    Both pull back the same vectors: labels drawn from logits that differ by rounding could differ.
    Sums of its own are made for the time of the check; plain gradients take up to `memory` more.

    Args:
        tolerance: relative to the larger of the two norms of a tensor; None: by the model's dtype, see `TOLERANCES`.

    Raises:
        EstimationError: parameters disagree (the data lists each with its error), or the engine refuses.
    """
    parameters = dict(model.named_parameters())
    recorder = _Recorder(labels)
    engine = engine_class(model, recorder, score, memory=memory)
    try:
        engine.add(batch)
    finally:
        engine.close()
    replay = _Replay(recorder.recorded)
    squares = {name: total.double().norm() for name, total in engine.sums.items()}
    roots = {name: float(norm) / max(1, parameters[name].numel()) ** 0.5 for name, norm in squares.items()}
    loosest = max((parameter.dtype for parameter in parameters.values()), key=_precision)
    if tolerance is None:
        tolerance = TOLERANCES.get(loosest, TOLERANCES[torch.float32])
    # The noise of a gradient is relative to the values it is a difference of, so to other layers' gradients.
    floor = max(roots.values()) * (_NOISE * _precision(loosest)) ** 2
    errors: dict[str, float] = {}
    noise: list[str] = []
    for names in _in_blocks(parameters, memory):
        expected = _plain_squares(model, replay, score, batch, {name: parameters[name] for name in names})
        for name in names:
            plain = expected[name].double()
            rms = float(plain.norm()) / max(1, plain.numel()) ** 0.5
            if max(rms, roots[name]) <= floor:
                noise.append(name)
                continue
            difference = float((engine.sums[name].double() - plain).norm())
            errors[name] = difference / max(float(plain.norm()), float(squares[name]))
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    if wrong:
        raise _disagreement(engine_class.name, wrong, tolerance, len(errors))
    worst = max(errors, key=lambda name: errors[name], default=None)
    checked = SelfCheck(worst, errors[worst] if worst else 0.0, tolerance, len(errors), tuple(noise))
    logger.info(
        "self-check: %s agrees with plain gradients on %d parameters, largest relative error %.1e (%s)",
        engine_class.name,
        checked.compared,
        checked.worst_error,
        checked.worst_parameter,
    )
    return checked


def _precision(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def _in_blocks(parameters: dict[str, torch.nn.Parameter], memory: int) -> Iterator[list[str]]:
    """Names of parameters whose gradients and squares fit `memory` together, at least one at a time."""
    block: list[str] = []
    used = 0
    for name, parameter in parameters.items():
        needed = parameter.numel() * (8 + parameter.element_size())
        if block and used + needed > memory:
            yield block
            block, used = [], 0
        block.append(name)
        used += needed
    if block:
        yield block


def _plain_squares(
    model: torch.nn.Module,
    labels: LabelSource,
    score: Score,
    batch: Batch,
    parameters: dict[str, torch.nn.Parameter],
) -> dict[str, torch.Tensor]:
    """Σ over examples and columns of squared gradients, float32."""
    total = {
        name: torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        for name, parameter in parameters.items()
    }
    with plainly_differentiable(model):
        for _, gradients in plain_gradients(model, labels, score, batch, list(parameters.values())):
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    total[name] += gradient.float().square()
    return total


def _disagreement(engine: str, wrong: dict[str, float], tolerance: float, compared: int) -> EstimationError:
    worst = sorted(wrong, key=lambda name: -wrong[name])
    shown = ", ".join(f"{name} ({wrong[name]:.1e})" for name in worst[:5])
    more = f" and {len(worst) - 5} more" if len(worst) > 5 else ""
    return EstimationError(
        f"the {engine} engine's squared gradients differ from plain autograd in {len(wrong)} of {compared} "
        f"parameters by more than {tolerance:g}: {shown}{more}",
        hint="use --per-example loop"
        if engine != "loop"
        else "the model does not give the same gradients twice; is something in it random?",
        engine=engine,
        tolerance=tolerance,
        errors={name: wrong[name] for name in worst},
    )


class _Recorder(LabelSource):
    """Passes on another source's columns and remembers each example's."""

    name = "recorded"

    def __init__(self, source: LabelSource) -> None:
        super().__init__(seed=source.seed, draws=source.draws)
        self._source = source
        self.recorded: dict[int, list[torch.Tensor]] = {}

    def columns(self, scores: Scores, ids: Sequence[int]) -> Iterator[torch.Tensor]:
        for v in self._source.columns(scores, ids):
            for index, example in enumerate(ids):
                self.recorded.setdefault(example, []).append(v[index : index + 1].clone())
            yield v

    def column_count(self, classes: int, positions: int = 1) -> int:
        return self._source.column_count(classes, positions)


class _Replay(LabelSource):
    """The columns that a `_Recorder` saw, for one example at a time."""

    name = "replayed"

    def __init__(self, recorded: dict[int, list[torch.Tensor]]) -> None:
        super().__init__()
        self._recorded = recorded

    def columns(self, scores: Scores, ids: Sequence[int]) -> Iterator[torch.Tensor]:  # noqa: ARG002
        (example,) = ids
        yield from self._recorded[example]

    def column_count(self, classes: int, positions: int = 1) -> int:  # noqa: ARG002
        return max((len(columns) for columns in self._recorded.values()), default=0)
